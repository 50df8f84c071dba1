"""Indexes for a large fleet: offers of one pool, none of those who fell silent, ends of leases.

Of a pool of fifty among a million agents the index of all offers has to be read from end to end.
And while a pool's transitions are held, its silent agents are still ``online``: if they were the
best of the fleet, every question would step over each of them. ``lapsed_heartbeat_at`` is the
heartbeat by which a row was found silent. Any other heartbeat brings the row back, whoever wrote
it. The sweep finds whose lease is over without looking at all the others.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0009"
down_revision: str | None = "0008"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_BEST_FIRST = (
    sa.text("coalesce(room[1], free_vram_gb) DESC"),
    sa.text("coalesce(room[3], free_cores) DESC"),
    sa.text("performance_score DESC"),
    "agent_id",
)
_BEFORE = sa.text("status = 'online' AND metrics_sound")
_OFFERED = sa.text(
    "status = 'online' AND metrics_sound AND last_heartbeat_at IS DISTINCT FROM lapsed_heartbeat_at"
)

# The planner knows nothing of ends of leases: they move on all the time, and those that it looked
# at when it counted are over. Of what a sweep looks for there are few, so it takes the index.
_CANDIDATES = """
CREATE FUNCTION chiffon_silence_candidates() RETURNS SETOF uuid
LANGUAGE sql STABLE ROWS 10 SET enable_seqscan = off AS $$
  SELECT agent_id FROM agent_registry
   WHERE status IN ('online', 'busy')
     AND ((last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second'
            < statement_timestamp() AT TIME ZONE 'UTC'
          OR (last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second'
            > (statement_timestamp() + interval '1805 seconds') AT TIME ZONE 'UTC'
          OR (last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second' IS NULL)
   UNION
  -- A heartbeat from the future is none. There are some only after the clock was set back.
  SELECT agent_id FROM agent_registry
   WHERE status IN ('online', 'busy')
     AND last_heartbeat_at > statement_timestamp() + interval '5 seconds'
     AND EXISTS (SELECT FROM ingest_path
                  WHERE clock_set_back_at > statement_timestamp() - interval '1805 seconds')
$$
"""


def upgrade() -> None:
    op.add_column("agent_registry", sa.Column("lapsed_heartbeat_at", sa.DateTime(timezone=True)))
    op.drop_index("idx_agent_registry_offers", table_name="agent_registry")
    op.create_index(
        "idx_agent_registry_offers",
        "agent_registry",
        [*_BEST_FIRST],
        postgresql_where=_OFFERED,
    )
    op.create_index(
        "idx_agent_registry_pool_offers",
        "agent_registry",
        ["pool_name", *_BEST_FIRST],
        postgresql_where=_OFFERED,
    )
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
    op.add_column("ingest_path", sa.Column("clock_set_back_at", sa.DateTime(timezone=True)))
    op.execute(_CANDIDATES)


def downgrade() -> None:
    op.execute("DROP FUNCTION chiffon_silence_candidates")
    op.drop_column("ingest_path", "clock_set_back_at")
    op.drop_index("idx_agent_registry_marked", table_name="agent_registry")
    op.drop_index("idx_agent_registry_lease", table_name="agent_registry")
    op.drop_index("idx_agent_registry_pool_offers", table_name="agent_registry")
    op.drop_index("idx_agent_registry_offers", table_name="agent_registry")
    op.drop_column("agent_registry", "lapsed_heartbeat_at")
    op.create_index(
        "idx_agent_registry_offers",
        "agent_registry",
        [*_BEST_FIRST],
        postgresql_where=_BEFORE,
    )
