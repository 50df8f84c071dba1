"""Agents that an operator named: they are not forgotten by themselves when they are long gone."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("agent_registry", sa.Column("named_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("agent_registry", "named_at")
