"""All amounts that are asked for stand in the indexes of the offers.

Without memory and the VRAM of one GPU, an amount that few have was looked up in the row of each
agent: a million of them in more than the 5 s that an answer may take.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_BEST_FIRST = (
    sa.text("coalesce(room[1], free_vram_gb) DESC"),
    sa.text("coalesce(room[3], free_cores) DESC"),
    sa.text("performance_score DESC"),
    "agent_id",
)
_AFTER_IT = (
    sa.text("coalesce(room[4], free_memory_gb)"),
    sa.text("coalesce(room[2], free_single_gpu_vram_gb)"),
)
_OFFERED = sa.text(
    "status = 'online' AND metrics_sound AND last_heartbeat_at IS DISTINCT FROM lapsed_heartbeat_at"
)


def upgrade() -> None:
    _create(_BEST_FIRST + _AFTER_IT)


def downgrade() -> None:
    _create(_BEST_FIRST)


def _create(columns: Sequence[sa.TextClause | str]) -> None:
    for name, first in (
        ("idx_agent_registry_offers", ()),
        ("idx_agent_registry_pool_offers", ("pool_name",)),
    ):
        op.drop_index(name, table_name="agent_registry")
        op.create_index(name, "agent_registry", [*first, *columns], postgresql_where=_OFFERED)
