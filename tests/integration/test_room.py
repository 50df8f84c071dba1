"""What is left of an agent through the life of a job, and what SQL may leave out."""

from contextlib import suppress
from random import Random
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg

from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.room import Wanted, fits
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityQuery, CapacityReserve, Reservation, StatusUpdate
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import InsufficientCapacity
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Candidate
from tests.fixtures.rooms import gpu, record, request, rig
from tests.fixtures.servers import Servers, new_database

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


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


def fleet_of(chance: Random) -> list[StatusUpdate]:
    """Return the heartbeats of a few agents, most of which could take something."""
    return [
        rig(
            *(gpu(index, float(chance.randint(0, 40))) for index in range(chance.randint(0, 3))),
            status="busy" if chance.random() < 0.1 else "online",
            agent_type=chance.choice(["desktop", "desktop", "research"]),
            pool_name=chance.choice(["default", "lab"]),
            capabilities=chance.choice([[], ["gpu"], ["gpu", "ssd"]]),
            resources={
                "gpu_type": chance.choice(["nvidia", "nvidia", "amd", None]),
                "cpu_cores_available": chance.choice([None, 2, 8, 16]),
                "memory_available_gb": chance.choice([None, 4.0, 32.0]),
            },
        )
        for _ in range(chance.randint(1, 8))
    ]


def request_of(chance: Random) -> CapacityReserve:
    """Return a request that some of such agents can take."""
    return request(
        gpu_vram_gb=float(chance.randint(0, 20)),
        gpus=chance.choice([1, 1, 2]),
        cpu_cores=chance.randint(1, 6),
        memory_gb=float(chance.choice([0, 2, 16])),
        agent_type=chance.choice([None, "desktop"]),
        pool_name=chance.choice([None, None, "lab"]),
        gpu_type=chance.choice([None, None, "nvidia"]),
        capabilities=chance.choice([[], [], ["gpu"]]),
    )


async def test_sql_leaves_out_nobody_whom_the_rules_would_take(servers: Servers) -> None:
    """Random fleets, with random reservations on them: who fits by ``room`` is found by SQL."""
    fitting = 0
    async with new_database(servers, migrated=True) as url, Registry.open(url) as registry:
        database = await asyncpg.connect(asyncpg_url(url))
        service = ReservationService(registry)
        for seed in range(60):
            chance = Random(seed)
            await database.execute("TRUNCATE agent_registry, reservation")
            await record(registry, *fleet_of(chance))
            for one in [request_of(chance) for _ in range(4)]:
                wanted = Wanted.of(one)
                everybody = [
                    Candidate.examined(row)
                    async for rows in registry.offers.examine(with_metrics=True)
                    for row in rows
                ]
                by_rules = {each.agent_id for each in everybody if fits(each, wanted)}
                found = await registry.offers.find(wanted.needs, 100)
                by_sql = {each.agent_id for each in found.candidates}
                assert by_rules <= by_sql, (seed, one)
                fitting += len(by_rules)
                with suppress(InsufficientCapacity):
                    await service.reserve(one)
        await database.close()
    assert fitting > 50, "nothing was compared"
