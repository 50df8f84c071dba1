"""Reservations, who waits for room, and agents that are drained.

What is reserved on an agent stands in the agent's own row as well, by reservation: so whoever
holds the row's lock knows all that decides whether more fits.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("agent_registry", sa.Column("reserved", JSONB()))
    op.add_column("agent_registry", sa.Column("drain_reason", sa.Text()))
    op.add_column("agent_registry", sa.Column("drained_at", sa.DateTime(timezone=True)))
    op.add_column("agent_registry", sa.Column("drain_deadline", sa.DateTime(timezone=True)))
    op.create_index(
        "idx_agent_registry_reserved",
        "agent_registry",
        ["agent_id"],
        postgresql_where=sa.text("reserved IS NOT NULL"),
    )
    op.execute("CREATE SEQUENCE reservation_fence AS bigint")
    op.create_table(
        "reservation",
        sa.Column("reservation_id", sa.Uuid(), primary_key=True),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Uuid()),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="held"),
        sa.Column("reason", sa.Text()),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("requests", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("gpu_vram_gb", sa.Float(), nullable=False),
        sa.Column("cpu_cores", sa.Integer(), nullable=False),
        sa.Column("memory_gb", sa.Float(), nullable=False),
        sa.Column("agent_ids", ARRAY(sa.Uuid()), nullable=False),
        sa.Column("places", JSONB(), nullable=False),
        sa.Column("alternative", sa.Integer(), nullable=False, server_default="0"),
        sa.CheckConstraint(
            "state IN ('held', 'released', 'expired', 'revoked')", name="reservation_state_is_known"
        ),
        sa.CheckConstraint(
            "(state = 'held') = (ended_at IS NULL)", name="reservation_ended_has_a_time"
        ),
        sa.UniqueConstraint("holder", "idempotency_key", name="reservation_key"),
        sa.UniqueConstraint("fence", name="reservation_fence_is_unique"),
    )
    op.create_index(
        "idx_reservation_held",
        "reservation",
        ["expires_at"],
        postgresql_where=sa.text("state = 'held'"),
    )
    op.create_index(
        "idx_reservation_ended",
        "reservation",
        ["ended_at"],
        postgresql_where=sa.text("state <> 'held'"),
    )
    op.create_table(
        "wait_queue",
        sa.Column("wait_id", sa.Uuid(), primary_key=True),
        sa.Column("position", sa.BigInteger(), sa.Identity(), nullable=False, unique=True),
        sa.Column("request", JSONB(), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reply", JSONB(), nullable=False),
        sa.Column("answering_until", sa.DateTime(timezone=True)),
        sa.Column("tries", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("offered_at", sa.DateTime(timezone=True)),
        sa.Column("offered_agent_id", sa.Uuid()),
    )


def downgrade() -> None:
    op.drop_table("wait_queue")
    op.drop_table("reservation")
    op.execute("DROP SEQUENCE reservation_fence")
    op.drop_index("idx_agent_registry_reserved", table_name="agent_registry")
    for name in ("drain_deadline", "drained_at", "drain_reason", "reserved"):
        op.drop_column("agent_registry", name)
