"""What is left of an agent's room: the functions in the database against plain Python."""

import json
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chiffon.capacity import OrchestratorService
from chiffon.messages import CapacityQuery, Reservation
from chiffon.registry import Registry, asyncpg_url
from chiffon.reservations import ReservationService
from tests.fixtures.rooms import gpu, record, request, rig
from tests.fixtures.servers import Databases

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass(frozen=True)
class Holder:
    """A reservation: what it took, what was free before it, what it is seen to use."""

    taken: int
    before: int
    seen: int | None


def left(live: int, total: int | None, holders: list[Holder]) -> int:
    """Say what ``chiffon_left`` should say, one step after the other."""
    idle = live + sum(one.seen or 0 for one in holders)
    unused = [max(one.taken - one.seen, 0) for one in holders if one.seen is not None]
    vague = [one for one in holders if one.seen is None]
    remaining = [one.taken for one in vague]
    for place, one in enumerate(vague):
        until = vague[place + 1].before if place + 1 < len(vague) else idle
        became_less = max(one.before - max(until, idle), 0)
        for earlier in range(place + 1):
            explained = min(remaining[earlier], became_less)
            remaining[earlier] -= explained
            became_less -= explained
    most = total if total is not None else max([idle, *(one.before for one in holders)])
    bound = most - sum(one.taken for one in holders)
    return max(min(bound, live - sum(unused) - sum(remaining)), 0)


amounts = st.integers(0, 40)
holders = st.lists(st.builds(Holder, st.integers(1, 20), amounts, st.none() | amounts), max_size=6)


async def test_what_is_left_is_what_plain_python_says(databases: Databases) -> None:
    async with databases.new(migrated=True) as url:
        connection = await asyncpg.connect(asyncpg_url(url))
        cases: list[tuple[int, int | None, list[Holder]]] = []

        @settings(max_examples=400, suppress_health_check=list(HealthCheck))
        @given(amounts, st.none() | st.integers(20, 60), holders)
        def collect(live: int, total: int | None, found: list[Holder]) -> None:
            cases.append((live, total, found))

        collect()
        try:
            for live, total, found in cases:
                answer = await connection.fetchval(
                    "SELECT chiffon_left($1::int::numeric, $2::int::numeric, $3::int[]::numeric[],"
                    " $4::int[]::numeric[], $5::int[]::numeric[])",
                    live,
                    total,
                    [one.taken for one in found],
                    [one.before for one in found],
                    [one.seen for one in found],
                )
                assert answer == left(live, total, found), (live, total, found)
                # Never more than is free, and never more than nobody has taken.
                assert answer <= live
                if total is not None:
                    assert answer <= max(total - sum(one.taken for one in found), 0)
        finally:
            await connection.close()


async def free(registry: Registry) -> float:
    """Return what is offered of the only agent's VRAM."""
    found = await OrchestratorService(registry).find(CapacityQuery(min_cpu_cores=0))
    [offer] = found.agents
    assert offer.gpu_vram_available_gb is not None
    return offer.gpu_vram_available_gb


class Rig:
    """One agent with one GPU of 80 GiB, whose job's life is told heartbeat by heartbeat."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.agent_id = uuid4()
        self.sequence = 0

    async def says(self, free_gb: float, observed: list[dict[str, Any]] | None = None) -> float:
        """Let it report, and return what is offered of it then."""
        self.sequence += 1
        await record(
            self.registry,
            rig(
                gpu(0, free_gb),
                agent_id=self.agent_id,
                sequence=self.sequence,
                resources={"observed": observed or []},
            ),
        )
        return await free(self.registry)


def seen(reservation: Reservation, vram_gb: float | None) -> dict[str, Any]:
    """Return what an agent reports of a reservation whose processes it knows."""
    return {
        "reservation_id": str(reservation.reservation_id),
        "gpus": [{"uuid": "GPU-0", "index": 0, "vram_gb": vram_gb}],
    }


async def test_the_moments_of_a_job_whose_processes_are_known(registry: Registry) -> None:
    agent, service = Rig(registry), ReservationService(registry)

    assert await agent.says(80.0) == 80.0
    job = await service.reserve(request(gpu_vram_gb=40.0))
    assert await free(registry) == 40.0, "reserved room counts at once"
    assert await agent.says(65.0, [seen(job, 15.0)]) == 40.0, "loading is not counted twice"
    assert await agent.says(40.0, [seen(job, 40.0)]) == 40.0
    assert await agent.says(33.0, [seen(job, 47.0)]) == 33.0, "what it uses beyond counts"
    assert await agent.says(13.0, [seen(job, 47.0)]) == 13.0, "so does what others use by hand"
    assert await agent.says(20.0, [seen(job, 40.0)]) == 20.0
    assert await agent.says(60.0, [seen(job, 0.0)]) == 20.0, "it may load again"


async def test_the_moments_of_a_job_of_which_only_the_memory_is_seen(registry: Registry) -> None:
    agent, service = Rig(registry), ReservationService(registry)

    assert await agent.says(70.0) == 70.0, "others had 10 before"
    await service.reserve(request(gpu_vram_gb=40.0))
    assert await free(registry) == 30.0
    assert await agent.says(55.0) == 30.0, "what became less since is taken for its own"
    assert await agent.says(30.0) == 30.0
    assert await agent.says(25.0) == 25.0, "and what is beyond that for others'"


async def test_a_second_job_is_not_taken_for_the_memory_of_the_first(registry: Registry) -> None:
    agent, service = Rig(registry), ReservationService(registry)
    await agent.says(80.0)
    await service.reserve(request(gpu_vram_gb=20.0))
    assert await agent.says(60.0) == 60.0

    await service.reserve(request(gpu_vram_gb=30.0))

    assert await free(registry) == 30.0
    assert await agent.says(50.0) == 30.0
    assert await agent.says(30.0) == 30.0


async def test_a_stranger_who_comes_first_is_not_taken_for_the_job(registry: Registry) -> None:
    agent, service = Rig(registry), ReservationService(registry)
    await agent.says(80.0)
    await agent.says(50.0)

    await service.reserve(request(gpu_vram_gb=20.0))

    assert await free(registry) == 30.0
    assert await agent.says(50.0) == 30.0


async def test_with_unknown_processes_a_stranger_who_comes_later_is_taken_for_the_job(
    registry: Registry,
) -> None:
    """The error that the documentation states: too much is offered, by as much as is guessed."""
    agent, service = Rig(registry), ReservationService(registry)
    await agent.says(80.0)
    job = await service.reserve(request(gpu_vram_gb=20.0))

    assert await agent.says(65.0) == 60.0, "45 would be right"
    assert await agent.says(65.0, [seen(job, 0.0)]) == 45.0, "and is, where processes are tied"


async def test_what_the_operator_keeps_is_kept_from_all_reservations(registry: Registry) -> None:
    kept = rig(gpu(0, 70.0), resources={"kept": {"gpu_vram_gb": 10.0}})
    await record(registry, kept)

    await ReservationService(registry).reserve(request(gpu_vram_gb=40.0))

    assert await free(registry) == 30.0


async def test_the_gpu_with_most_room_is_taken_and_of_the_right_vendor(registry: Registry) -> None:
    await record(
        registry,
        rig(
            gpu(0, 10.0, gpu_type="nvidia"),
            gpu(1, 30.0, gpu_type="nvidia"),
            gpu(2, 39.0, gpu_type="amd"),
            resources={"gpu_vram_available_gb": 40.0, "gpu_vram_total_gb": 160.0},
        ),
    )
    service = ReservationService(registry)

    first = await service.reserve(request(gpu_vram_gb=8.0))
    second = await service.reserve(request(gpu_vram_gb=8.0, gpus=2))

    assert [one.index for one in first.gpus] == [1]
    assert sorted(one.index for one in second.gpus) == [0, 1]


async def test_a_gpu_without_memory_of_its_own_shares_the_hosts(registry: Registry) -> None:
    await record(
        registry,
        rig(gpu(0, 30.0, 32.0, is_unified=True), resources={"memory_available_gb": 30.0}),
    )
    service = ReservationService(registry)

    await service.reserve(request(gpu_vram_gb=10.0, memory_gb=5.0))
    found = await OrchestratorService(registry).find(CapacityQuery(min_cpu_cores=0))

    [offer] = found.agents
    assert (offer.gpu_vram_available_gb, offer.memory_available_gb) == (15.0, 15.0)


@pytest.mark.parametrize(
    "metrics",
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
async def test_nothing_that_others_write_makes_it_fail(database: Connection, metrics: str) -> None:
    held = {
        str(UUID(int=1)): {
            "fence": 1,
            "gpus": {"index 0": [4, 10]},
            "cores": [1, 4],
            "memory": [1, 8],
            "chosen": [],
        }
    }
    room = await database.fetchval(
        "SELECT chiffon_room_left($1::jsonb, $2::jsonb)", metrics, json.dumps(held)
    )

    assert len(room) == 4
    assert all(one >= 0 for one in room)
    await database.fetchval("SELECT chiffon_take($1::jsonb, NULL, 1, 1, 0, 0)", metrics)
