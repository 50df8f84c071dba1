"""Most of a pool silent at once: one outage, not a thousand transitions."""

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest

from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityQuery, StatusUpdate
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.heartbeats import update
from tests.fixtures.sweeping import sweep

Connection = Any

LEASE = 15.0
MARKED_AFTER = 20.0
"""Seconds of silence after which an agent with an interval of 5 s is marked."""


@pytest.fixture(autouse=True)
async def path(registry: Registry, database: Connection) -> None:
    """The canary has come through for hours."""
    await registry.path.mark_fresh(time.monotonic())
    await database.execute(
        "UPDATE ingest_path SET fresh_since = now() - interval '3 hours',"
        " grace_until = now() - interval '3 hours'"
    )


async def fleet(registry: Registry, pool_name: str, count: int) -> list[UUID]:
    updates = sorted(
        (update(pool_name=pool_name) for _ in range(count)), key=lambda one: one.agent_id
    )
    await registry.heartbeats.record([Received(one, time.monotonic()) for one in updates])
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
    await registry.heartbeats.record([Received(one, time.monotonic()) for one in updates])


async def status_counts(database: Connection) -> dict[str, int]:
    rows = await database.fetch("SELECT status, count(*) FROM agent_registry GROUP BY status")
    return {row["status"]: row["count"] for row in rows}


async def test_when_most_of_a_pool_becomes_silent_nobody_is_marked(
    registry: Registry, database: Connection
) -> None:
    desks, other = await fleet(registry, "desks", 10), await fleet(registry, "other", 10)
    await silence(database, desks[:6], MARKED_AFTER + 1)
    await silence(database, other[:3], MARKED_AFTER + 1)

    swept = await sweep(registry)
    again = await sweep(registry)

    assert swept.began == ["desks"]
    assert {one.agent_id for one in swept.marked} == set(other[:3])
    assert (again.began, again.marked) == ([], [])
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

    swept = await sweep(registry)

    assert bool(swept.began) == is_outage
    assert len(swept.marked) == (0 if is_outage else silent)


async def test_those_who_are_silent_and_not_yet_due_count_too(
    registry: Registry, database: Connection
) -> None:
    """They died together; their last heartbeats are up to an interval apart."""
    agents = await fleet(registry, "desks", 10)
    await silence(database, agents[:1], MARKED_AFTER + 0.5)
    await silence(database, agents[1:9], LEASE + 0.5)

    swept = await sweep(registry)

    assert (swept.began, swept.marked) == (["desks"], [])


async def test_those_who_were_marked_within_the_last_lease_count_too(
    registry: Registry, database: Connection
) -> None:
    agents = await fleet(registry, "desks", 10)
    marked: set[UUID] = set()
    frozen: list[str] = []
    for agent_id in agents:
        await silence(database, [agent_id], MARKED_AFTER + 1)
        swept = await sweep(registry)
        marked |= {one.agent_id for one in swept.marked}
        frozen += swept.began

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

    swept = await sweep(registry)

    assert swept.began == ["desks"]
    assert {one.agent_id for one in swept.marked} == set(other[:2])
    await speak(registry, desks[:1], 2, "desks")
    back = await sweep(registry)
    assert (back.ended, back.marked) == (["desks"], []), "a lease for those who are left"


async def test_farewells_are_no_outage(registry: Registry, database: Connection) -> None:
    agents = await fleet(registry, "desks", 10)
    await registry.heartbeats.record(
        [
            Received(
                update(agent_id, sequence=2, pool_name="desks", status="offline"), time.monotonic()
            )
            for agent_id in agents[:8]
        ]
    )
    await silence(database, agents[8:9], MARKED_AFTER + 1)

    swept = await sweep(registry)

    assert swept.began == []
    assert [one.agent_id for one in swept.marked] == [agents[8]]


async def test_after_the_clock_was_set_back_a_little_the_dead_are_found_as_soon_as_ever(
    registry: Registry, database: Connection
) -> None:
    dead, *_ = await fleet(registry, "desks", 10)
    # The last canary and the last heartbeat are a minute ahead of the clock now.
    await database.execute("UPDATE ingest_path SET fresh_at = now() + interval '60 seconds'")
    await silence(database, [dead], -60)
    await registry.path.mark_fresh(time.monotonic())
    assert (await sweep(registry)).marked == [], "its grace is over too early"

    await database.execute(
        "UPDATE ingest_path SET grace_until = now(),"
        " fresh_since = now() - $1 * interval '1 second'",
        MARKED_AFTER + 1,
    )
    swept = await sweep(registry)

    assert [one.agent_id for one in swept.marked] == [dead]


async def test_those_silent_in_a_frozen_pool_leave_the_index_of_offers_until_they_speak(
    registry: Registry, database: Connection
) -> None:
    desks, other = await fleet(registry, "desks", 10), await fleet(registry, "other", 2)
    await silence(database, desks[:6], MARKED_AFTER + 1)
    await silence(database, other[:1], LEASE + 1)

    async def hidden() -> set[UUID]:
        rows = await database.fetch(
            "SELECT agent_id FROM agent_registry WHERE last_heartbeat_at = hidden_heartbeat_at"
        )
        return {row["agent_id"] for row in rows}

    async def offered() -> set[UUID]:
        answer = await OrchestratorService(registry).find(CapacityQuery(agent_type=None))
        return {offer.agent_id for offer in answer.agents}

    assert (await sweep(registry)).began == ["desks"]
    await sweep(registry)
    assert await hidden() == set(desks[:6])
    assert await offered() == {*desks[6:], other[1]}

    await speak(registry, desks[:1], 2, "desks")
    # Somebody else's program may write to the table as well.
    await silence(database, desks[1:2], 0)
    await sweep(registry)
    assert await hidden() == set(desks[2:6])
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
    await sweep(registry)

    assert [await degraded(pool) for pool in (None, "desks", "other")] == [True, True, False]
    offers = await service.find(CapacityQuery(pool_name="desks"))
    assert [offer.agent_id for offer in offers.agents] == desks[3:], "the silent are not offered"


async def test_when_a_pool_speaks_again_everybody_in_it_has_a_lease_of_grace(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 10)
    await silence(database, desks, MARKED_AFTER + 1)
    assert (await sweep(registry)).began == ["desks"]

    await speak(registry, desks[:8], 2, "desks")
    back = await sweep(registry)
    again = await sweep(registry)

    assert (back.ended, back.marked) == (["desks"], [])
    assert (again.ended, again.marked, again.began) == ([], [], [])
    await database.execute(
        "UPDATE pool_outage SET ended_at = now() - $1 * interval '1 second'", MARKED_AFTER + 1
    )
    late = await sweep(registry)
    assert {one.agent_id for one in late.marked} == set(desks[8:])


async def test_a_pool_that_went_home_is_marked_after_all_and_slowly(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 5)
    await silence(database, desks, MARKED_AFTER + 1)
    await sweep(registry, outage_hold_seconds=600)
    await database.execute("UPDATE pool_outage SET began_at = now() - interval '599 seconds'")
    assert (await sweep(registry, outage_hold_seconds=600)).marked == []

    await database.execute("UPDATE pool_outage SET began_at = now() - interval '601 seconds'")
    first = await asyncio.gather(*(sweep(registry, outage_hold_seconds=600) for _ in range(4)))
    marked = [one.agent_id for swept in first for one in swept.marked]
    assert len(marked) == 1, "one a second, also with several orchestrators"
    for _ in range(4):
        await database.execute(
            "UPDATE agent_registry SET status_changed_at = status_changed_at - interval '2 seconds'"
        )
        swept = await sweep(registry, outage_hold_seconds=600)
        marked += [one.agent_id for one in swept.marked]

    assert sorted(marked) == desks
    assert (await sweep(registry)).ended == ["desks"], "nobody is left to wait for"


async def test_many_orchestrators_find_one_outage_once_and_mark_nobody(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 200)
    await silence(database, desks, MARKED_AFTER + 1)

    swept = await asyncio.gather(*(sweep(registry) for _ in range(8)))

    assert [name for one in swept for name in one.began] == ["desks"]
    assert [one for each in swept for one in each.marked] == []

    await speak(registry, desks, 2, "desks")
    swept = await asyncio.gather(*(sweep(registry) for _ in range(8)))
    assert [name for one in swept for name in one.ended] == ["desks"]


async def test_an_agent_whose_connection_closed_is_hidden_unless_it_spoke_since(
    registry: Registry, database: Connection
) -> None:
    desks = await fleet(registry, "desks", 3)
    await silence(database, desks, 3.0)
    await speak(registry, desks[1:2], 2, "desks")
    service = OrchestratorService(registry)

    async def offered() -> set[UUID]:
        answer = await service.find(CapacityQuery(agent_type=None))
        return {offer.agent_id for offer in answer.agents}

    closed = [desks[0], desks[1]]
    hidden = await registry.sweep.hide_disconnected(closed, [1.6, 1.6])
    again = await registry.sweep.hide_disconnected(closed, [1.6, 1.6])

    assert [agent_id for agent_id, _ in hidden] == [desks[0]]
    assert again == [], "once"
    assert await offered() == {desks[1], desks[2]}
    assert (await sweep(registry)).marked == [], "its lease decides whether it is offline"
    explanation = await service.explain(CapacityQuery(agent_type=None))
    assert "1 whose connection closed" in explanation.summary
    shown = await registry.agents.show(desks[0])
    assert shown is not None
    assert (shown.status, shown.is_silent) == ("online", True)

    await speak(registry, desks[:1], 2, "desks")
    assert await offered() == set(desks)


async def test_every_offline_has_a_reason_and_a_time(
    registry: Registry, database: Connection
) -> None:
    agents = await fleet(registry, "desks", 8)
    await silence(database, agents[:1], MARKED_AFTER + 1)
    await silence(database, agents[1:2], 3.0)
    await registry.heartbeats.record(
        [Received(update(agents[2], sequence=2, status="offline"), time.monotonic())]
    )
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = NULL WHERE agent_id = $1", agents[3]
    )

    await sweep(registry)

    rows = [await registry.agents.show(agent_id) for agent_id in agents[:5]]
    assert [row.status_reason for row in rows if row is not None] == [
        "missed 4 heartbeats",
        None,
        "farewell",
        "never heard of",
        None,
    ]
    assert all(row is not None and row.status_changed_at is not None for row in rows)

    await speak(registry, agents[:1], 3, "desks")
    back = await registry.agents.show(agents[0])
    assert back is not None
    assert (back.status, back.status_reason) == ("online", None)


async def test_each_change_of_status_is_told_once(registry: Registry) -> None:
    one = update()
    told = []
    for sequence, status in enumerate(
        ["online", "online", "busy", "busy", "online", "offline", "offline", "online"], start=1
    ):
        changed = update(one.agent_id, sequence=sequence, status=status)
        batches = [[Received(changed, time.monotonic())] for _ in range(3)]
        results = await asyncio.gather(*(registry.heartbeats.record(batch) for batch in batches))
        told += [each.status for result in results for each in result.transitions]

    assert told == ["online", "busy", "online", "offline", "online"]
