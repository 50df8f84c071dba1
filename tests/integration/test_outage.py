"""Most of a pool silent at once: one outage, not a thousand transitions."""

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest

from chiffon.capacity import OrchestratorService
from chiffon.messages import CapacityQuery, StatusUpdate
from chiffon.receipt import Receipt
from chiffon.registry import Closing, Registry
from tests.fixtures.heartbeats import update

Connection = Any

LEASE = 15.0
MARKED_AFTER = 20.0
"""Seconds of silence after which an agent with an interval of 5 s is marked."""


@pytest.fixture(autouse=True)
async def path(registry: Registry, database: Connection) -> None:
    """The canary has come through for hours."""
    await registry.mark_path_fresh(time.monotonic())
    await database.execute(
        "UPDATE ingest_path SET fresh_since = now() - interval '3 hours',"
        " grace_until = now() - interval '3 hours'"
    )


async def fleet(registry: Registry, pool_name: str, count: int) -> list[UUID]:
    updates = sorted(
        (update(pool_name=pool_name) for _ in range(count)), key=lambda one: one.agent_id
    )
    await registry.record([Receipt(one, time.monotonic()) for one in updates])
    return [one.agent_id for one in updates]


async def silence(database: Connection, agents: list[UUID], seconds: float) -> None:
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = now() - $2 * interval '1 second'"
        " WHERE agent_id = ANY($1)",
        agents,
        seconds,
    )


async def speak(registry: Registry, agents: list[UUID], sequence: int, pool: str) -> None:
    updates: list[StatusUpdate] = [
        update(agent_id, sequence=sequence, pool_name=pool) for agent_id in agents
    ]
    await registry.record([Receipt(one, time.monotonic()) for one in updates])


def closing(agent_id: UUID, seconds_ago: float = 1.6, is_known: bool = True) -> Closing:
    return Closing(agent_id, seconds_ago, is_known)


async def status_counts(database: Connection) -> dict[str, int]:
    rows = await database.fetch("SELECT status, count(*) FROM agent_registry GROUP BY status")
    return {row["status"]: row["count"] for row in rows}


async def test_when_most_of_a_pool_falls_silent_nobody_is_marked(
    registry: Registry, database: Connection
) -> None:
    desks, other = await fleet(registry, "desks", 10), await fleet(registry, "other", 10)
    await silence(database, desks[:6], MARKED_AFTER + 1)
    await silence(database, other[:3], MARKED_AFTER + 1)

    swept = await registry.mark_silent()
    again = await registry.mark_silent()

    assert swept.frozen == ["desks"]
    assert {one.agent_id for one in swept.transitions} == set(other[:3])
    assert (again.frozen, again.transitions) == ([], [])
    assert await status_counts(database) == {"online": 17, "offline": 3}


@pytest.mark.parametrize(
    ("members", "silent", "is_outage"),
    [(2, 2, False), (3, 3, True), (20, 11, False), (20, 12, True), (100, 55, False)],
)
async def test_an_outage_is_more_than_the_share_and_more_than_two(
    registry: Registry, database: Connection, members: int, silent: int, is_outage: bool
) -> None:
    agents = await fleet(registry, "desks", members)
    await silence(database, agents[:silent], MARKED_AFTER + 1)

    swept = await registry.mark_silent()

    assert bool(swept.frozen) == is_outage
    assert len(swept.transitions) == (0 if is_outage else silent)


async def test_those_who_are_silent_and_not_yet_due_count_too(
    registry: Registry, database: Connection
) -> None:
    """They died together; their last heartbeats are up to an interval apart."""
    agents = await fleet(registry, "desks", 10)
    await silence(database, agents[:1], MARKED_AFTER + 0.5)
    await silence(database, agents[1:9], LEASE + 0.5)

    swept = await registry.mark_silent()

    assert (swept.frozen, swept.transitions) == (["desks"], [])


async def test_those_who_were_marked_within_the_last_lease_count_too(
    registry: Registry, database: Connection
) -> None:
    agents = await fleet(registry, "desks", 10)
    marked: set[UUID] = set()
    frozen: list[str] = []
    for agent_id in agents:
        await silence(database, [agent_id], MARKED_AFTER + 1)
        swept = await registry.mark_silent()
        marked |= {one.agent_id for one in swept.transitions}
        frozen += swept.frozen

    assert marked == set(agents[:5])
    assert frozen == ["desks"]


async def test_a_pool_of_which_many_are_not_back_after_an_absence_is_still_in_the_outage(
    registry: Registry, database: Connection
) -> None:
    """The grace of all is over; more than a quarter of one pool has not been heard since."""
    desks, other = await fleet(registry, "desks", 10), await fleet(registry, "other", 10)
    await silence(database, desks[:3] + other[:2], MARKED_AFTER + 60)
    await database.execute(
        "UPDATE ingest_path SET fresh_since = now() - $1 * interval '1 second'", MARKED_AFTER + 1
    )

    swept = await registry.mark_silent()

    assert swept.frozen == ["desks"]
    assert {one.agent_id for one in swept.transitions} == set(other[:2])
    await speak(registry, desks[:1], 2, "desks")
    back = await registry.mark_silent()
    assert (back.thawed, back.transitions) == (["desks"], []), "a lease for those who are left"


async def test_farewells_are_no_outage(registry: Registry, database: Connection) -> None:
    agents = await fleet(registry, "desks", 10)
    await registry.record(
        [
            Receipt(
                update(agent_id, sequence=2, pool_name="desks", status="offline"), time.monotonic()
            )
            for agent_id in agents[:8]
        ]
    )
    await silence(database, agents[8:9], MARKED_AFTER + 1)

    swept = await registry.mark_silent()

    assert swept.frozen == []
    assert [one.agent_id for one in swept.transitions] == [agents[8]]


async def test_after_the_clock_was_set_back_a_little_the_dead_are_found_as_soon_as_ever(
    registry: Registry, database: Connection
) -> None:
    dead, *_ = await fleet(registry, "desks", 10)
    # The last canary and the last heartbeat are a minute ahead of the clock now.
    await database.execute("UPDATE ingest_path SET fresh_at = now() + interval '60 seconds'")
    await silence(database, [dead], -60)
    await registry.mark_path_fresh(time.monotonic())
    assert (await registry.mark_silent()).transitions == [], "its grace is over too early"

    await database.execute(
        "UPDATE ingest_path SET grace_until = now(),"
        " fresh_since = now() - $1 * interval '1 second'",
        MARKED_AFTER + 1,
    )
    swept = await registry.mark_silent()

    assert [one.agent_id for one in swept.transitions] == [dead]


async def test_those_silent_in_a_frozen_pool_leave_the_index_of_offers_until_they_speak(
    registry: Registry, database: Connection
) -> None:
    desks, other = await fleet(registry, "desks", 10), await fleet(registry, "other", 2)
    await silence(database, desks[:6], MARKED_AFTER + 1)
    await silence(database, other[:1], LEASE + 1)

    async def lapsed() -> set[UUID]:
        rows = await database.fetch(
            "SELECT agent_id FROM agent_registry WHERE last_heartbeat_at = lapsed_heartbeat_at"
        )
        return {row["agent_id"] for row in rows}

    async def offered() -> set[UUID]:
        answer = await OrchestratorService(registry).find(CapacityQuery(agent_type=None))
        return {offer.agent_id for offer in answer.agents}

    assert (await registry.mark_silent()).frozen == ["desks"]
    await registry.mark_silent()
    assert await lapsed() == set(desks[:6])
    assert await offered() == {*desks[6:], other[1]}

    await speak(registry, desks[:1], 2, "desks")
    # Somebody else's program may write to the table as well.
    await silence(database, desks[1:2], 0)
    await registry.mark_silent()
    assert await lapsed() == set(desks[2:6])
    assert await offered() == {*desks[:2], *desks[6:], other[1]}


async def test_answers_about_a_frozen_pool_are_degraded_and_others_are_not(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 4)
    await fleet(registry, "other", 1)
    await silence(database, desks[:3], MARKED_AFTER + 1)
    service = OrchestratorService(registry)

    async def degraded(pool_name: str | None) -> bool:
        return (await service.find(CapacityQuery(pool_name=pool_name))).degraded

    assert not await degraded(None)
    await registry.mark_silent()

    assert [await degraded(pool) for pool in (None, "desks", "other")] == [True, True, False]
    offers = await service.find(CapacityQuery(pool_name="desks"))
    assert [offer.agent_id for offer in offers.agents] == desks[3:], "the silent are not offered"


async def test_when_a_pool_speaks_again_everybody_in_it_has_a_lease_of_grace(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 10)
    await silence(database, desks, MARKED_AFTER + 1)
    assert (await registry.mark_silent()).frozen == ["desks"]

    await speak(registry, desks[:8], 2, "desks")
    back = await registry.mark_silent()
    again = await registry.mark_silent()

    assert (back.thawed, back.transitions) == (["desks"], [])
    assert (again.thawed, again.transitions, again.frozen) == ([], [], [])
    await database.execute(
        "UPDATE pool_state SET thawed_at = now() - $1 * interval '1 second'", MARKED_AFTER + 1
    )
    late = await registry.mark_silent()
    assert {one.agent_id for one in late.transitions} == set(desks[8:])


async def test_a_pool_that_went_home_is_marked_after_all_and_slowly(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 5)
    await silence(database, desks, MARKED_AFTER + 1)
    await registry.mark_silent(hold_seconds=600)
    await database.execute("UPDATE pool_state SET frozen_at = now() - interval '599 seconds'")
    assert (await registry.mark_silent(hold_seconds=600)).transitions == []

    await database.execute("UPDATE pool_state SET frozen_at = now() - interval '601 seconds'")
    first = await asyncio.gather(*(registry.mark_silent(hold_seconds=600) for _ in range(4)))
    marked = [one.agent_id for swept in first for one in swept.transitions]
    assert len(marked) == 1, "one a second, also with several orchestrators"
    for _ in range(4):
        await database.execute(
            "UPDATE agent_registry SET status_changed_at = status_changed_at - interval '2 seconds'"
        )
        swept = await registry.mark_silent(hold_seconds=600)
        marked += [one.agent_id for one in swept.transitions]

    assert sorted(marked) == desks
    assert (await registry.mark_silent()).thawed == ["desks"], "nobody is left to wait for"


async def test_many_orchestrators_find_one_outage_once_and_mark_nobody(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 200)
    await silence(database, desks, MARKED_AFTER + 1)

    swept = await asyncio.gather(*(registry.mark_silent() for _ in range(8)))

    assert [name for one in swept for name in one.frozen] == ["desks"]
    assert [one for each in swept for one in each.transitions] == []

    await speak(registry, desks, 2, "desks")
    swept = await asyncio.gather(*(registry.mark_silent() for _ in range(8)))
    assert [name for one in swept for name in one.thawed] == ["desks"]


async def test_a_closed_connection_is_silence_unless_something_came_since(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 5)
    await silence(database, desks, 3.0)
    await speak(registry, desks[1:2], 2, "desks")

    swept = await registry.mark_silent([closing(agent_id) for agent_id in desks[:2]])

    assert [(one.agent_id, one.reason) for one in swept.transitions] == [
        (desks[0], "connection closed")
    ]
    assert (await registry.mark_silent([closing(desks[0])])).transitions == [], "once"
    soon = [closing(desks[2], seconds_ago=1.4), closing(desks[3], is_known=False)]
    assert (await registry.mark_silent(soon)).transitions == [], "not settled"
    await silence(database, desks[3:4], 7.0)
    late = [closing(desks[3], seconds_ago=6.3, is_known=False)]
    assert len((await registry.mark_silent(late)).transitions) == 1


@pytest.mark.parametrize("is_known", [True, False])
async def test_however_often_an_agent_speaks_it_has_time_to_dial_again(
    registry: Registry, database: Connection, is_known: bool
) -> None:
    quick = update(interval_seconds=0.5)
    await registry.record([Receipt(quick, time.monotonic())])
    await silence(database, [quick.agent_id], 2.0)

    async def marked(seconds_ago: float) -> list[UUID]:
        closings = [closing(quick.agent_id, seconds_ago, is_known)]
        return [one.agent_id for one in (await registry.mark_silent(closings)).transitions]

    assert await marked(1.4) == []
    assert await marked(1.6) == [quick.agent_id]


async def test_many_connections_that_close_at_once_are_an_outage(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 10)
    await silence(database, desks, 3.0)

    # The first has settled; the others closed a moment later.
    later = [closing(agent_id, seconds_ago=0.9) for agent_id in desks[1:7]]
    swept = await registry.mark_silent([closing(desks[0]), *later])

    assert (swept.frozen, swept.transitions) == (["desks"], [])


@pytest.mark.parametrize("others_came_back", [True, False])
async def test_connections_that_close_with_many_others_tell_of_the_line_alone(
    registry: Registry, database: Connection, others_came_back: bool
) -> None:
    """3 of 10 within 5 s are more than a quarter: who is slow to dial again has its lease."""
    desks = await fleet(registry, "desks", 10)
    await silence(database, desks, 3.0)

    def others(seconds_ago: float) -> list[Closing]:
        return [Closing(one, seconds_ago, True, others_came_back) for one in desks[1:3]]

    swept = await registry.mark_silent([closing(desks[0], seconds_ago=2.0), *others(1.0)])
    assert (swept.frozen, swept.transitions) == ([], [])

    alone = await registry.mark_silent([closing(desks[0], seconds_ago=2.0), *others(8.0)[:1]])
    assert [one.agent_id for one in alone.transitions][:1] == [desks[0]]


async def test_a_line_that_breaks_for_many_small_pools_is_seen_over_the_whole_fleet(
    registry: Registry, database: Connection
) -> None:
    pools = [await fleet(registry, f"pool-{number}", 2) for number in range(4)]
    for pool in pools:
        await silence(database, pool, 3.0)

    swept = await registry.mark_silent([closing(pool[0], seconds_ago=2.0) for pool in pools])

    assert swept.transitions == []


async def test_a_closed_connection_tells_nothing_while_the_canary_is_not_fresh(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 5)
    await silence(database, desks, 3.0)
    await database.execute("UPDATE ingest_path SET fresh_at = now() - interval '6 seconds'")

    assert (await registry.mark_silent([closing(desks[0])])).transitions == []


async def test_a_closed_connection_tells_nothing_while_somebodys_grace_is_running(
    registry: Registry, database: Connection
) -> None:
    """After the broker was away all dial at once, and some of them more than once."""
    desks = await fleet(registry, "desks", 5)
    await silence(database, desks, 3.0)
    await silence(database, desks[4:], 12.0)
    await database.execute(
        "UPDATE ingest_path SET fresh_since = now() - interval '10 seconds',"
        " grace_until = now() + interval '10 seconds'"
    )

    assert (await registry.mark_silent([closing(desks[0])])).transitions == []


async def test_every_offline_has_a_reason_and_a_time(
    registry: Registry, database: Connection
) -> None:
    agents = await fleet(registry, "desks", 8)
    await silence(database, agents[:1], MARKED_AFTER + 1)
    await silence(database, agents[1:2], 3.0)
    await registry.record(
        [Receipt(update(agents[2], sequence=2, status="offline"), time.monotonic())]
    )
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = NULL WHERE agent_id = $1", agents[3]
    )

    await registry.mark_silent([closing(agents[1])])

    rows = [await registry.show(agent_id) for agent_id in agents[:5]]
    assert [row.status_reason for row in rows if row is not None] == [
        "missed 4 heartbeats",
        "connection closed",
        "farewell",
        "never heard of",
        None,
    ]
    assert all(row is not None and row.status_changed_at is not None for row in rows)

    await speak(registry, agents[:1], 3, "desks")
    back = await registry.show(agents[0])
    assert back is not None
    assert (back.status, back.status_reason) == ("online", None)


async def test_each_change_of_status_is_told_once(registry: Registry) -> None:
    one = update()
    told = []
    for sequence, status in enumerate(
        ["online", "online", "busy", "busy", "online", "offline", "offline", "online"], start=1
    ):
        changed = update(one.agent_id, sequence=sequence, status=status)
        batches = [[Receipt(changed, time.monotonic())] for _ in range(3)]
        results = await asyncio.gather(*(registry.record(batch) for batch in batches))
        told += [each.status for result in results for each in result.transitions]

    assert told == ["online", "busy", "online", "offline", "online"]
