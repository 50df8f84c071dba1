"""What is left of an agent: beside arithmetic of another make, and whatever anybody wrote there."""

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.capacity.room import RULES, Wanted, allocate, broken, room
from chiffon.contract.messages import CapacityQuery
from chiffon.registry.rows import Candidate
from tests.fixtures.rooms import request


@dataclass(frozen=True)
class Holder:
    """A reservation: what it took, what was free before it, what it is seen to use."""

    taken: int
    before: int
    seen: int | None


def left(live: int, total: int | None, holders: list[Holder]) -> int:
    """Say what is left, one step after the other."""
    idle = live + sum(one.seen or 0 for one in holders)
    unused = [max(one.taken - one.seen, 0) for one in holders if one.seen is not None]
    vague = [one for one in holders if one.seen is None]
    remaining = [one.taken for one in vague]
    for number, one in enumerate(vague):
        until = vague[number + 1].before if number + 1 < len(vague) else idle
        became_less = max(one.before - max(until, idle), 0)
        for earlier in range(number + 1):
            explained = min(remaining[earlier], became_less)
            remaining[earlier] -= explained
            became_less -= explained
    most = total if total is not None else max([idle, *(one.before for one in holders)])
    bound = most - sum(one.taken for one in holders)
    return max(min(bound, live - sum(unused) - sum(remaining)), 0)


amounts = st.integers(0, 40)
holders = st.lists(st.builds(Holder, st.integers(1, 20), amounts, st.none() | amounts), max_size=6)


def reserved(found: list[Holder]) -> dict[str, Any]:
    """Return what an agent keeps of reservations of its only GPU, in the order of fences."""
    return {
        str(UUID(int=number)): {
            "gpus": {"GPU-0": [one.taken, one.before, 0]},
            "cores": [0, 0],
            "memory": [0, 0],
            "fence": number,
        }
        for number, one in enumerate(found, start=1)
    }


def metrics(live: int, total: int | None, found: list[Holder]) -> dict[str, Any]:
    """Return what such an agent reports, and of whose processes it knows what they use."""
    return {
        "gpu_type": "nvidia",
        "gpu_vram_available_gb": live,
        "gpus": [{"uuid": "GPU-0", "index": 0, "vram_total_gb": total, "vram_available_gb": live}],
        "observed": [
            {
                "reservation_id": str(UUID(int=number)),
                "gpus": [{"uuid": "GPU-0", "index": 0, "vram_gb": one.seen}],
            }
            for number, one in enumerate(found, start=1)
            if one.seen is not None
        ],
    }


@given(amounts, st.none() | st.integers(20, 60), holders)
def test_what_is_left_is_what_is_counted_step_by_step(
    live: int, total: int | None, found: list[Holder]
) -> None:
    [gpu] = room(metrics(live, total, found), reserved(found)).gpus

    assert gpu.available_gb == left(live, total, found)
    # Never more than is free, and never more than nobody has taken.
    assert gpu.available_gb <= live
    if total is not None:
        assert gpu.available_gb <= max(total - sum(one.taken for one in found), 0)


def candidate(told: Any, entries: Any = None, **fields: Any) -> Candidate:
    """Return an agent that fits whatever asks for little, but for what is given."""
    usual: dict[str, Any] = {
        "agent_id": uuid4(),
        "hostname": "rig-7",
        "pool_name": "default",
        "agent_type": "desktop",
        "capabilities_text": "[]",
        "status": "online",
        "drained": False,
        "metrics_sound": True,
        "is_fresh": True,
        "is_hidden": False,
        "free_vram_gb": 20.0,
        "free_single_gpu_vram_gb": 20.0,
        "free_cores": 8.0,
        "free_memory_gb": 32.0,
        "performance_score": 0.0,
        "last_heartbeat_at": None,
        "age_seconds": 1.0,
        "metrics_text": json.dumps(told),
        "reserved_text": None if entries is None else json.dumps(entries),
    }
    return Candidate(**{**usual, **fields})


ONE_GPU = {
    "gpu_type": "nvidia",
    "gpu_vram_available_gb": 20.0,
    "cpu_cores_available": 8,
    "memory_available_gb": 32.0,
}
QUERY = CapacityQuery()


@pytest.mark.parametrize(
    ("fields", "query", "rules"),
    [
        ({}, QUERY, []),
        ({"status": "offline", "is_fresh": False}, QUERY, ["offline", "silent"]),
        ({"status": "busy"}, QUERY, ["busy"]),
        ({"drained": True}, QUERY, ["drained"]),
        ({"is_fresh": None}, QUERY, ["silent"]),
        ({"is_hidden": True}, QUERY, ["disconnected"]),
        ({"is_fresh": False, "is_hidden": True}, QUERY, ["silent"]),
        ({"metrics_sound": None}, QUERY, ["no_metrics"]),
        ({"metrics_sound": False}, QUERY, ["malformed_metrics"]),
        ({}, CapacityQuery(pool_name="lab"), ["pool_name"]),
        ({"agent_type": "code"}, QUERY, ["agent_type"]),
        ({}, CapacityQuery(gpu_type="amd"), ["gpu_type"]),
        ({}, CapacityQuery(capabilities=["ssd"]), ["capabilities"]),
        ({"capabilities_text": '["gpu", "ssd"]'}, CapacityQuery(capabilities=["ssd"]), []),
        ({"capabilities_text": "5"}, CapacityQuery(capabilities=["ssd"]), ["capabilities"]),
        ({}, CapacityQuery(min_gpu_vram_gb=20.0), []),
        ({}, CapacityQuery(min_gpu_vram_gb=20.1), ["min_gpu_vram_gb"]),
        ({}, CapacityQuery(min_single_gpu_vram_gb=21.0), ["min_single_gpu_vram_gb"]),
        ({"free_cores": 0.0}, QUERY, ["min_cpu_cores"]),
        ({}, CapacityQuery(min_memory_gb=33.0), ["min_memory_gb"]),
        ({}, CapacityQuery(min_cpu_cores=9, pool_name="lab"), ["pool_name", "min_cpu_cores"]),
    ],
)
def test_each_rule_is_broken_by_what_it_is_about(
    fields: dict[str, Any], query: CapacityQuery, rules: list[str]
) -> None:
    assert broken(candidate(ONE_GPU, **fields), Wanted.of(query)) == rules
    assert rules == sorted(rules, key=RULES.index)


@pytest.mark.parametrize(
    ("fields", "rules"),
    [
        ({"gpu_vram_gb": 20.0}, []),
        ({"gpu_vram_gb": 10.0, "gpus": 2}, ["gpus"]),
        ({"gpu_vram_gb": 20.0, "agent_id": UUID(int=1)}, ["agent_id"]),
        ({"cpu_cores": 8}, []),
        ({"cpu_cores": 9}, ["min_cpu_cores"]),
    ],
)
def test_a_reservation_needs_a_place_where_no_amount_is_missing(
    fields: dict[str, Any], rules: list[str]
) -> None:
    assert broken(candidate(ONE_GPU), Wanted.of(request(**fields))) == rules


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{}",
        '"x"',
        '{"gpus": 7}',
        '{"gpus": [7, null, {}, {"uuid": 3, "vram_available_gb": "x"}], "observed": {"a": 1}}',
        '{"gpus": [{"vram_available_gb": 1e400}], "gpu_vram_available_gb": 1e400}',
        '{"cpu_cores_available": "many", "observed": [1, {"reservation_id": 5, "gpus": 5}]}',
        '{"kept": 5, "gpu_type": []}',
    ],
)
def test_nothing_that_others_write_makes_it_fail(told: str) -> None:
    entries = {
        str(UUID(int=1)): {
            "fence": 1,
            "gpus": {"index 0": [4, 10]},
            "cores": [1, 4],
            "memory": [1, 8],
            "chosen": [],
        }
    }
    for odd in (entries, {"mine": 1}, {"mine": {"fence": "x", "gpus": 7, "cores": "y"}}, {}):
        one = candidate({}, odd, metrics_text=told)
        assert all(amount >= 0 for amount in room(one.metrics, one.reserved).available)
        allocate(one, Wanted.of(request(gpu_vram_gb=1.0)))
