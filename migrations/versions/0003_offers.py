"""What a capacity query filters and orders by, computed by PostgreSQL and indexed."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
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
)


def _free(key: str, missing: int) -> sa.Computed:
    return sa.Computed(
        f"CASE jsonb_typeof(resource_metrics -> '{key}')"
        f" WHEN 'number' THEN"
        f" least(greatest((resource_metrics ->> '{key}')::numeric, -1e15), 1e15)::float8"
        f" WHEN 'null' THEN 0 ELSE {missing} END",
        persisted=True,
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


def upgrade() -> None:
    free = {
        "free_vram_gb": _free("gpu_vram_available_gb", 0),
        "free_cores": _free("cpu_cores_available", 1),
        "free_memory_gb": _free("memory_available_gb", 0),
    }
    for name, computed in free.items():
        op.add_column("agent_registry", sa.Column(name, sa.Float(), computed))
    op.add_column(
        "agent_registry",
        sa.Column("metrics_sound", sa.Boolean(), sa.Computed(_SOUND, persisted=True)),
    )
    op.create_index(
        "idx_agent_registry_offers",
        "agent_registry",
        [
            sa.text("free_vram_gb DESC"),
            sa.text("free_cores DESC"),
            sa.text("performance_score DESC"),
            "agent_id",
        ],
        postgresql_where=sa.text("status = 'online' AND metrics_sound"),
    )
    op.create_index(
        "idx_agent_registry_malformed",
        "agent_registry",
        ["agent_id"],
        postgresql_where=sa.text("NOT metrics_sound"),
    )


def downgrade() -> None:
    op.drop_index("idx_agent_registry_malformed", table_name="agent_registry")
    op.drop_index("idx_agent_registry_offers", table_name="agent_registry")
    for name in ("metrics_sound", "free_memory_gb", "free_cores", "free_vram_gb"):
        op.drop_column("agent_registry", name)
