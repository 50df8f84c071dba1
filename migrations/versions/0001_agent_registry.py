"""The registry, before agents reported resources."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "agent_registry",
        sa.Column("agent_id", sa.Uuid(), primary_key=True),
        sa.Column("agent_type", sa.Text(), nullable=False),
        sa.Column("pool_name", sa.Text(), nullable=False),
        sa.Column(
            "capabilities",
            postgresql.JSONB(),
            nullable=False,
            server_default=sa.text("'[]'"),
        ),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("last_heartbeat_at", sa.DateTime(timezone=True)),
        sa.Column("performance_score", sa.Float(), nullable=False, server_default=sa.text("0")),
        sa.Column("hostname", sa.Text()),
        sa.Column("agent_version", sa.Text()),
        sa.Column("incarnation", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("sequence", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
        sa.Column("sent_at", sa.DateTime(timezone=True)),
        sa.Column("interval_seconds", sa.Float(), nullable=False, server_default=sa.text("5")),
        sa.Column("lease_seconds", sa.Float(), nullable=False, server_default=sa.text("15")),
        sa.Column("drained", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.CheckConstraint(
            "status IN ('online', 'offline', 'busy')", name="agent_registry_status_is_known"
        ),
    )


def downgrade() -> None:
    op.drop_table("agent_registry")
