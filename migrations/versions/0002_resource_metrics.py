"""What the probes read, one JSON document an agent; agents that were there before have {}.

``jsonb`` and not ``json``: PostgreSQL has no GIN operator class for the latter. The index is one of
``jsonb_path_ops``: it serves containment (``@>``), costs a heartbeat two thirds of what
``jsonb_ops`` costs, and what the latter can do beyond it (``?``, whether a key is there) tells
nothing where every row has every key.
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
        postgresql_ops={"resource_metrics": "jsonb_path_ops"},
    )


def downgrade() -> None:
    op.drop_index("idx_agent_registry_resource_metrics", table_name="agent_registry")
    op.drop_column("agent_registry", "resource_metrics")
