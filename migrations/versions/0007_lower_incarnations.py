"""How many heartbeats of a lower incarnation came for an agent, and when the last did."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column(
        "agent_registry",
        sa.Column("lower_incarnations", sa.BigInteger(), nullable=False, server_default="0"),
    )
    op.add_column("agent_registry", sa.Column("lower_incarnation_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("agent_registry", "lower_incarnation_at")
    op.drop_column("agent_registry", "lower_incarnations")
