"""Who is alive, and whether we are able to tell.

Of each agent: why and since when it has its status, how many heartbeats of an earlier start came
(a cloned disk), and by which heartbeat it was hidden from offers. Of ourselves: when a canary last
went the whole way from publish to commit (``ingest_path``), and by which of its parts. Of pools:
when most of one became silent at once (``pool_outage``).
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# A canary from the future was proven before the clock was set back: it proves nothing.
_PATH_STATE = """
CREATE VIEW path_state AS
SELECT fresh_at, fresh_since, grace_until, queue_delay_seconds, clock_set_back_at,
       statement_timestamp() BETWEEN fresh_at - interval '1 second'
                                 AND fresh_at + proves_seconds * interval '1 second' AS is_fresh
  FROM ingest_path
"""


def upgrade() -> None:
    for column in (
        sa.Column("status_reason", sa.Text()),
        sa.Column("status_changed_at", sa.DateTime(timezone=True)),
        sa.Column("lower_incarnations", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("lower_incarnation_at", sa.DateTime(timezone=True)),
        sa.Column("hidden_heartbeat_at", sa.DateTime(timezone=True)),
    ):
        op.add_column("agent_registry", column)
    op.create_index(
        "idx_agent_registry_lease",
        "agent_registry",
        [
            # In UTC, as the sum of a time with a zone and an interval may depend on the session's.
            sa.text(
                "((last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * '00:00:01'::interval)"
            )
        ],
        postgresql_where=sa.text("status IN ('online', 'busy')"),
    )
    op.create_index(
        "idx_agent_registry_marked",
        "agent_registry",
        ["status_changed_at"],
        postgresql_where=sa.text("status = 'offline'"),
    )
    op.create_table(
        "ingest_path",
        sa.Column("only_row", sa.SmallInteger(), primary_key=True, server_default=sa.text("1")),
        sa.Column("fresh_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("proves_seconds", sa.Float(), nullable=False),
        sa.Column("fresh_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("grace_until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("queue_delay_seconds", sa.Float()),
        sa.Column("clock_set_back_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("only_row = 1", name="ingest_path_has_one_row"),
    )
    op.create_table(
        "ingest_part",
        sa.Column("name", sa.Text(), primary_key=True),
        sa.Column("fresh_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "pool_outage",
        sa.Column("pool_name", sa.Text(), primary_key=True),
        sa.Column("began_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
    )
    op.execute(_PATH_STATE)


def downgrade() -> None:
    op.execute("DROP VIEW path_state")
    op.drop_table("pool_outage")
    op.drop_table("ingest_part")
    op.drop_table("ingest_path")
    op.drop_index("idx_agent_registry_marked", table_name="agent_registry")
    op.drop_index("idx_agent_registry_lease", table_name="agent_registry")
    for name in (
        "hidden_heartbeat_at",
        "lower_incarnation_at",
        "lower_incarnations",
        "status_changed_at",
        "status_reason",
    ):
        op.drop_column("agent_registry", name)
