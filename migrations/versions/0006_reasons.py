"""Why and since when an agent is offline; pools that fell silent at once; the queue's delay."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("agent_registry", sa.Column("status_reason", sa.Text()))
    op.add_column("agent_registry", sa.Column("status_changed_at", sa.DateTime(timezone=True)))
    op.add_column("ingest_path", sa.Column("queue_delay_seconds", sa.Float()))
    op.create_table(
        "pool_state",
        sa.Column("pool_name", sa.Text(), primary_key=True),
        sa.Column("frozen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("thawed_at", sa.DateTime(timezone=True)),
    )


def downgrade() -> None:
    op.drop_table("pool_state")
    op.drop_column("ingest_path", "queue_delay_seconds")
    op.drop_column("agent_registry", "status_changed_at")
    op.drop_column("agent_registry", "status_reason")
