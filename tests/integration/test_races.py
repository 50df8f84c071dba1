"""Many planners at the same room: who gets it, and that nobody gets it twice.

The statements that come to mind first are kept here, wrong as they are: the same harness must
catch each of them, or it would catch nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon.capacity.reservations import ReservationService
from chiffon.contract.messages import ReservationRelease
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import CapacityRefused, InsufficientCapacity
from chiffon.registry.registry import Registry
from tests.fixtures.rooms import broken, gpu, record, request, rig

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

PLANNERS = 32
UNITS = 8
UNIT_GB = 10.0

# Each grants a unit of an agent's GPU of eight, or nothing.
CHECK = "SELECT coalesce(sum(gb), 0) FROM claim WHERE agent_id = $1"
INSERT = "INSERT INTO claim (agent_id, gb) VALUES ($1, 10)"
IN_ONE_STATEMENT = """
INSERT INTO claim (agent_id, gb)
SELECT $1, 10 WHERE (SELECT coalesce(sum(gb), 0) FROM claim WHERE agent_id = $1) + 10 <= 80
RETURNING 1
"""
LOCKED_BY_A_CTE = """
WITH locked AS MATERIALIZED (
  SELECT agent_id FROM agent_registry WHERE agent_id = $1 FOR UPDATE
), used AS (
  SELECT coalesce(sum(c.gb), 0) AS gb FROM locked LEFT JOIN claim c USING (agent_id)
)
INSERT INTO claim (agent_id, gb)
SELECT $1, 10 FROM locked, used WHERE used.gb + 10 <= 80 RETURNING 1
"""


async def check_then_insert(connection: Connection, agent_id: UUID) -> bool:
    if await connection.fetchval(CHECK, agent_id) + 10 > 80:
        return False
    await connection.execute(INSERT, agent_id)
    return True


async def check_then_insert_repeatably(connection: Connection, agent_id: UUID) -> bool:
    async with connection.transaction(isolation="repeatable_read"):
        return await check_then_insert(connection, agent_id)


async def insert_if_the_sum_fits(connection: Connection, agent_id: UUID) -> bool:
    return bool(await connection.fetchval(IN_ONE_STATEMENT, agent_id))


async def insert_under_a_lock_of_the_same_statement(connection: Connection, agent_id: UUID) -> bool:
    return bool(await connection.fetchval(LOCKED_BY_A_CTE, agent_id))


Way = Callable[[Connection, UUID], Awaitable[bool]]


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[list[Connection]]:
    made = [await asyncpg.connect(asyncpg_url(database_url)) for _ in range(PLANNERS)]
    yield made
    await asyncio.gather(*(one.close() for one in made))


@pytest.mark.parametrize(
    "way",
    [
        check_then_insert,
        check_then_insert_repeatably,
        insert_if_the_sum_fits,
        insert_under_a_lock_of_the_same_statement,
    ],
)
async def test_the_natural_statements_give_one_room_to_several(
    registry: Registry, database: Connection, connections: list[Connection], way: Way
) -> None:
    await database.execute("CREATE TABLE claim (agent_id uuid, gb int)")
    for _ in range(60):
        rival = rig(gpu(0, 80.0))
        await record(registry, rival)
        granted = await asyncio.gather(*(way(one, rival.agent_id) for one in connections))
        assert sum(granted) >= UNITS
        if sum(granted) > UNITS:
            return
    raise AssertionError("nothing was given twice: this would not see it if ours did")


async def test_ours_gives_each_unit_once(registry: Registry, database: Connection) -> None:
    """Thirty-two planners, many rounds."""
    service = ReservationService(registry)
    for _ in range(10):
        rival = rig(gpu(0, UNITS * UNIT_GB), pool_name=f"pool-{uuid4().hex[:8]}")
        await record(registry, rival)

        async def take(pool_name: str = rival.pool_name) -> bool | str:
            try:
                await service.reserve(request(pool_name=pool_name, gpu_vram_gb=UNIT_GB))
            except InsufficientCapacity as error:
                return str(error)
            return True

        outcomes = await asyncio.gather(*(take() for _ in range(PLANNERS)))

        assert outcomes.count(True) == UNITS
        reasons = [one for one in outcomes if one is not True]
        assert all("too little free VRAM (best" not in str(one) for one in reasons)
        assert all("too little free VRAM" in str(one) for one in reasons)
        assert await broken(database) == []


async def test_a_herd_finds_all_the_room_there_is(registry: Registry) -> None:
    """As many as there are units: none is told that there is none while there is."""
    agents = [rig(gpu(0, 2 * UNIT_GB), pool_name="herd") for _ in range(50)]
    await record(registry, *agents)
    service = ReservationService(registry)

    made = await asyncio.gather(
        *(service.reserve(request(pool_name="herd", gpu_vram_gb=UNIT_GB)) for _ in range(100))
    )

    assert {one.agent_id for one in made} == {one.agent_id for one in agents}


async def test_gangs_that_race_are_whole_or_not_at_all(
    registry: Registry, database: Connection
) -> None:
    agents = [rig(gpu(0, UNIT_GB), pool_name="gang") for _ in range(10)]
    await record(registry, *agents)
    service = ReservationService(registry)

    async def take(number: int) -> int:
        wanted = request(
            pool_name="gang", gpu_vram_gb=UNIT_GB, count=3, distinct_hosts=number % 2 == 0
        )
        try:
            return len((await service.reserve(wanted)).places)
        except CapacityRefused:
            return 0

    sizes = await asyncio.gather(*(take(number) for number in range(20)))

    assert sorted(sizes, reverse=True)[:4] == [3, 3, 3, 0]
    assert await broken(database) == []


async def test_one_key_at_once_from_everywhere_is_one_reservation(
    registry: Registry, database: Connection
) -> None:
    await record(registry, *(rig(gpu(0, 80.0)) for _ in range(5)))
    service = ReservationService(registry)
    wanted = request(gpu_vram_gb=UNIT_GB)

    made = await asyncio.gather(*(service.reserve(wanted) for _ in range(PLANNERS)))

    assert len({one.reservation_id for one in made}) == 1
    assert await broken(database) == []


async def test_renewing_releasing_and_ending_at_once_end_it_once(
    registry: Registry, database: Connection
) -> None:
    await record(registry, rig(gpu(0, 80.0)))
    service = ReservationService(registry)
    for _ in range(20):
        made = await service.reserve(request(gpu_vram_gb=70.0))
        release = ReservationRelease(reservation_id=made.reservation_id)
        await asyncio.gather(*(service.release(release) for _ in range(8)))
        assert await broken(database) == []
    assert await database.fetchval("SELECT reserved FROM agent_registry") is None


async def test_heartbeats_and_reservations_do_not_wait_for_each_other(
    registry: Registry, database_url: str
) -> None:
    """A reservation goes around a row that ingest holds; it takes another agent."""
    first, second = rig(gpu(0, 80.0)), rig(gpu(0, 40.0))
    await record(registry, first, second)
    service = ReservationService(registry)
    other = await asyncpg.connect(asyncpg_url(database_url))
    try:
        async with other.transaction():
            await other.execute(
                "SELECT FROM agent_registry WHERE agent_id = $1 FOR UPDATE", first.agent_id
            )
            made = await service.reserve(request(gpu_vram_gb=UNIT_GB))
            assert made.agent_id == second.agent_id
            with pytest.raises(CapacityRefused, match="try again"):
                await service.reserve(request(gpu_vram_gb=60.0))
    finally:
        await other.close()
    assert (await service.reserve(request(gpu_vram_gb=60.0))).agent_id == first.agent_id
