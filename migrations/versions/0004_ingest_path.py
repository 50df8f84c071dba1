"""One row that says since when heartbeats reach the registry."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "ingest_path",
        sa.Column("only_row", sa.SmallInteger(), primary_key=True, server_default=sa.text("1")),
        sa.Column("fresh_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fresh_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("grace_until", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("only_row = 1", name="ingest_path_has_one_row"),
    )


def downgrade() -> None:
    op.drop_table("ingest_path")
