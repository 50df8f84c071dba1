"""What is free on one GPU: eight cards with 10 GiB free cannot take a model of 40 GiB."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
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
_NEW_NUMBER = "gpu_vram_max_available_gb"


def _free(key: str, missing: str) -> str:
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
_FREE_SINGLE_GPU = _free(
    _NEW_NUMBER,
    f"CASE WHEN {_SEVERAL_GPUS} THEN 0 ELSE {_free('gpu_vram_available_gb', '0')} END",
)


def upgrade() -> None:
    op.add_column(
        "agent_registry",
        sa.Column(
            "free_single_gpu_vram_gb", sa.Float(), sa.Computed(_FREE_SINGLE_GPU, persisted=True)
        ),
    )
    _replace_metrics_sound((*_NUMBERS, _NEW_NUMBER))


def downgrade() -> None:
    _replace_metrics_sound(_NUMBERS)
    op.drop_column("agent_registry", "free_single_gpu_vram_gb")


def _replace_metrics_sound(numbers: Sequence[str]) -> None:
    # PostgreSQL changes the expression of a generated column only from version 17 on. Dropping
    # the column takes along the partial indexes that depend on it.
    sound = (
        "CASE WHEN resource_metrics = '{}' THEN NULL"
        " ELSE jsonb_typeof(resource_metrics) = 'object'"
        " AND coalesce(jsonb_typeof(resource_metrics -> 'gpu_type'), 'null')"
        " IN ('string', 'null')"
        + "".join(
            f" AND coalesce(jsonb_typeof(resource_metrics -> '{key}'), 'null')"
            " IN ('number', 'null')"
            for key in numbers
        )
        + " END"
    )
    op.drop_column("agent_registry", "metrics_sound")
    op.add_column(
        "agent_registry",
        sa.Column("metrics_sound", sa.Boolean(), sa.Computed(sound, persisted=True)),
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
