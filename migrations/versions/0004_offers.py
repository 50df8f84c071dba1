"""What a capacity query filters and orders by, and the indexes that serve it.

``free_*`` is what an agent reported, computed by PostgreSQL, so that rows which others write are
found as well. ``available_*`` is what reservations leave of it; NULL where nothing is reserved or
it is not computed yet, and then ``free_*`` stands in, which is never less. Both indexes are in the
order of the offers; the amounts behind the agent's id are there to be compared without a look at
the row.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_NUMBERS = (
    "cpu_percent",
    "cpu_cores_physical",
    "cpu_cores_available",
    "cpu_load_1min",
    "cpu_load_5min",
    "memory_percent",
    "memory_available_gb",
    "gpu_vram_total_gb",
    "gpu_vram_available_gb",
    "gpu_vram_max_available_gb",
)


def _free(key: str, missing: str) -> str:
    # Bounded, since a number that no float can hold would fail every statement on the row.
    return (
        f"CASE jsonb_typeof(resource_metrics -> '{key}')"
        f" WHEN 'number' THEN"
        f" least(greatest((resource_metrics ->> '{key}')::numeric, -1e15), 1e15)::float8"
        f" WHEN 'null' THEN 0 ELSE {missing} END"
    )


_SEVERAL_GPUS = (
    "CASE WHEN jsonb_typeof(resource_metrics -> 'gpus') = 'array'"
    " THEN jsonb_array_length(resource_metrics -> 'gpus') > 1 ELSE false END"
)
_FREE = {
    "free_vram_gb": _free("gpu_vram_available_gb", "0"),
    "free_single_gpu_vram_gb": _free(
        "gpu_vram_max_available_gb",
        f"CASE WHEN {_SEVERAL_GPUS} THEN 0 ELSE {_free('gpu_vram_available_gb', '0')} END",
    ),
    "free_cores": _free("cpu_cores_available", "1"),
    "free_memory_gb": _free("memory_available_gb", "0"),
}
_AVAILABLE = (
    "available_vram_gb",
    "available_single_gpu_vram_gb",
    "available_cores",
    "available_memory_gb",
)
_SOUND = (
    "CASE WHEN resource_metrics = '{}' THEN NULL"
    " ELSE jsonb_typeof(resource_metrics) = 'object'"
    " AND coalesce(jsonb_typeof(resource_metrics -> 'gpu_type'), 'null') IN ('string', 'null')"
    + "".join(
        f" AND coalesce(jsonb_typeof(resource_metrics -> '{key}'), 'null') IN ('number', 'null')"
        for key in _NUMBERS
    )
    + " END"
)
_BEST_FIRST = (
    sa.text("coalesce(available_vram_gb, free_vram_gb) DESC"),
    sa.text("coalesce(available_cores, free_cores) DESC"),
    sa.text("performance_score DESC"),
    "agent_id",
    sa.text("coalesce(available_memory_gb, free_memory_gb)"),
    sa.text("coalesce(available_single_gpu_vram_gb, free_single_gpu_vram_gb)"),
)
_OFFERED = sa.text(
    "status = 'online' AND metrics_sound AND last_heartbeat_at IS DISTINCT FROM hidden_heartbeat_at"
)


def upgrade() -> None:
    for name, sql in _FREE.items():
        column = sa.Column(name, sa.Float(), sa.Computed(sql, persisted=True))
        op.add_column("agent_registry", column)
    op.add_column(
        "agent_registry",
        sa.Column("metrics_sound", sa.Boolean(), sa.Computed(_SOUND, persisted=True)),
    )
    for name in _AVAILABLE:
        op.add_column("agent_registry", sa.Column(name, sa.Float()))
    op.create_index(
        "idx_agent_registry_offers", "agent_registry", [*_BEST_FIRST], postgresql_where=_OFFERED
    )
    op.create_index(
        "idx_agent_registry_pool_offers",
        "agent_registry",
        ["pool_name", *_BEST_FIRST],
        postgresql_where=_OFFERED,
    )
    op.create_index(
        "idx_agent_registry_malformed",
        "agent_registry",
        ["agent_id"],
        postgresql_where=sa.text("NOT metrics_sound"),
    )


def downgrade() -> None:
    for name in ("malformed", "pool_offers", "offers"):
        op.drop_index(f"idx_agent_registry_{name}", table_name="agent_registry")
    for name in (*_AVAILABLE, "metrics_sound", *_FREE):
        op.drop_column("agent_registry", name)
