"""What the probes read, one JSON document an agent; agents that were there before have {}.

``jsonb`` and not ``json``: PostgreSQL has no GIN operator class for the latter.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "agent_registry",
        sa.Column(
            "resource_metrics",
            postgresql.JSONB(),
            nullable=False,
            server_default=sa.text("'{}'"),
        ),
    )
    op.create_index(
        "idx_agent_registry_resource_metrics",
        "agent_registry",
        ["resource_metrics"],
        postgresql_using="gin",
    )


def downgrade() -> None:
    op.drop_index("idx_agent_registry_resource_metrics", table_name="agent_registry")
    op.drop_column("agent_registry", "resource_metrics")
