"""What one agent's row says, however it was written."""

import math
from typing import Any
from uuid import uuid4

import pytest

from chiffon.capacity.service import describe
from chiffon.contract.messages import SCALAR_METRICS
from chiffon.registry.rows import AgentRow
from chiffon.registry.tables import AgentRegistry
from tests.fixtures.heartbeats import RESOURCES


def row(metrics: Any) -> AgentRow:
    return AgentRow(
        agent_id=uuid4(),
        agent_type="desktop",
        pool_name="default",
        capabilities=[],
        status="online",
        hostname=None,
        agent_version=None,
        incarnation=0,
        sequence=0,
        sent_at=None,
        interval_seconds=5.0,
        lease_seconds=15.0,
        drained=False,
        last_heartbeat_at=None,
        resource_metrics=metrics,
        performance_score=0.0,
        status_reason=None,
        status_changed_at=None,
        lower_incarnations=0,
        lower_incarnation_at=None,
        age_seconds=None,
        clock_skew_seconds=None,
        queue_delay_seconds=None,
        is_silent=False,
    )


def scalars(metrics: Any) -> dict[str, Any]:
    return describe(row(metrics)).model_dump(include=set(SCALAR_METRICS))


def test_an_agent_that_never_reported_has_zeros_and_no_gpu() -> None:
    answer = scalars({})

    assert answer.pop("gpu_type") == "none"
    assert set(answer.values()) == {0}


def test_reported_metrics_are_answered_as_they_are() -> None:
    assert scalars(RESOURCES) == {**RESOURCES, "gpu_vram_max_available_gb": 20.5}


@pytest.mark.parametrize(
    ("metrics", "most"),
    [
        ({"gpu_vram_available_gb": 8.0}, 8.0),
        ({"gpu_vram_available_gb": None}, None),
        ({}, 0.0),
        ({"gpu_vram_available_gb": 8.0, "gpus": [{}]}, 8.0),
        ({"gpu_vram_available_gb": 8.0, "gpus": [{}, {}]}, 0.0),
        ({"gpu_vram_available_gb": 8.0, "gpu_vram_max_available_gb": 5.0, "gpus": [{}, {}]}, 5.0),
    ],
)
def test_a_row_with_one_gpu_or_none_has_its_free_vram_on_one_gpu(
    metrics: dict[str, Any], most: float | None
) -> None:
    answer = scalars({"cpu_percent": 1.0, **metrics})

    assert answer["gpu_vram_max_available_gb"] == most


def test_the_age_of_the_gpu_readings_is_told_as_reported() -> None:
    answers = [
        describe(row({"gpu_sample_age_seconds": age})).gpu_sample_age_seconds
        for age in (0.5, None, "old", -3)
    ]

    assert answers == [0.5, None, None, 0.0]


def test_a_missing_key_counts_as_no_vram_and_one_core_and_is_otherwise_unknown() -> None:
    answer = scalars({"cpu_percent": 50.0})

    assert answer["cpu_percent"] == 50.0
    assert (answer["gpu_vram_available_gb"], answer["cpu_cores_available"]) == (0.0, 1)
    assert answer["memory_available_gb"] is None


def test_null_stays_null() -> None:
    assert scalars({"gpu_vram_available_gb": None})["gpu_vram_available_gb"] is None


@pytest.mark.parametrize("value", ["a lot", True, [], {}, math.inf])
def test_a_value_of_another_type_is_unknown(value: Any) -> None:
    answer = scalars({"memory_available_gb": value, "cpu_cores_available": value, "gpu_type": 5})

    assert answer["memory_available_gb"] is None
    assert answer["cpu_cores_available"] is None
    assert answer["gpu_type"] is None


@pytest.mark.parametrize("metrics", [[], "x", 5, None])
def test_metrics_that_are_no_object_are_unknown(metrics: Any) -> None:
    assert scalars(metrics)["memory_percent"] is None


def test_the_table_takes_metrics_as_a_dict() -> None:
    agent = AgentRegistry(resource_metrics={"cpu_percent": 50.0})

    assert agent.resource_metrics == {"cpu_percent": 50.0}
