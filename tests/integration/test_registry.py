"""What the registry promises, on a real PostgreSQL."""

import asyncio
import json
import random
import time
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon.contract.lease import CANARY_FRESH_SECONDS, lease_for, offline_after
from chiffon.contract.messages import StatusUpdate
from chiffon.errors import RegistryRefused, RegistryUnavailable, RowRefused
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.heartbeats import RESOURCES, update
from tests.fixtures.sweeping import sweep

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


async def record(registry: Registry, *updates: StatusUpdate, held: float = 0.0) -> None:
    received = time.monotonic() - held
    await registry.heartbeats.record([Received(one, received) for one in sorted(updates, key=_id)])


def _id(one: StatusUpdate) -> UUID:
    return one.agent_id


async def row(database: Connection, agent_id: UUID) -> dict[str, Any]:
    found = await database.fetchrow("SELECT * FROM agent_registry WHERE agent_id = $1", agent_id)
    assert found is not None
    return dict(found)


async def make_silent(database: Connection, agent_id: UUID, seconds: float) -> None:
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = now() - $2 * interval '1 second'"
        " WHERE agent_id = $1",
        agent_id,
        seconds,
    )


async def prove_path(registry: Registry, database: Connection, since_seconds: float) -> None:
    """A canary has come through without a gap for this long."""
    await registry.path.mark_fresh(time.monotonic())
    await database.execute(
        "UPDATE ingest_path SET grace_until = now(),"
        " fresh_since = now() - $1 * interval '1 second'",
        since_seconds,
    )


async def test_a_heartbeat_is_recorded_as_it_was_sent(
    registry: Registry, database: Connection
) -> None:
    sent = update(capabilities=["gpu"], status="busy", pool_name="lab", interval_seconds=2.0)

    await record(registry, sent)

    kept = await row(database, sent.agent_id)
    assert (kept["status"], kept["pool_name"], kept["hostname"]) == ("busy", "lab", "rig-7")
    assert json.loads(kept["capabilities"]) == ["gpu"]
    assert (kept["incarnation"], kept["sequence"]) == sent.order
    assert kept["sent_at"] == sent.sent_at
    metrics = json.loads(kept["resource_metrics"])
    assert {name: metrics[name] for name in RESOURCES} == RESOURCES


async def test_the_time_of_receipt_is_the_databases_less_what_we_held(
    registry: Registry, database: Connection
) -> None:
    sent = update(sent_at="1999-01-01T00:00:00Z")

    await record(registry, sent, held=3.0)

    age = await database.fetchval(
        "SELECT extract(epoch FROM now() - last_heartbeat_at)::float8 FROM agent_registry"
    )
    assert 3.0 <= age < 6.0


@pytest.mark.parametrize(
    ("later", "applies"),
    [((2, 1), True), ((1, 8), True), ((1, 7), False), ((1, 6), False), ((0, 99), False)],
)
async def test_only_a_newer_heartbeat_changes_anything(
    registry: Registry, database: Connection, later: tuple[int, int], applies: bool
) -> None:
    agent_id = uuid4()
    await record(registry, update(agent_id, incarnation=1, sequence=7, hostname="first"))
    before = await row(database, agent_id)

    second = update(agent_id, incarnation=later[0], sequence=later[1], hostname="second")

    stale = (await registry.heartbeats.record([Received(second, time.monotonic())])).stale

    after = await row(database, agent_id)
    assert (after != before) == applies
    assert [one.kept_incarnation for one in stale] == ([] if applies else [1])


async def test_shuffled_and_repeated_heartbeats_end_in_the_newest_state(
    registry: Registry, database: Connection
) -> None:
    agents = [uuid4() for _ in range(20)]
    everything = [
        update(agent_id, sequence=sequence, hostname=f"host-{sequence}")
        for agent_id in agents
        for sequence in range(1, 11)
    ] * 2
    random.Random(7).shuffle(everything)

    async def consume(part: list[StatusUpdate]) -> None:
        for start in range(0, len(part), 15):
            newest = {one.agent_id: one for one in sorted(part[start : start + 15], key=_order)}
            await record(registry, *newest.values())

    await asyncio.gather(consume(everything[::2]), consume(everything[1::2]))

    rows = await database.fetch("SELECT sequence, hostname FROM agent_registry")
    assert {tuple(one) for one in rows} == {(10, "host-10")}
    assert len(rows) == 20


def _order(one: StatusUpdate) -> tuple[int, int]:
    return one.order


async def test_many_writers_on_the_same_agents_do_not_deadlock(
    registry: Registry, database: Connection
) -> None:
    agents = [uuid4() for _ in range(100)]
    await prove_path(registry, database, 3_600)

    async def write(writer: int) -> None:
        for number in range(10):
            chosen = random.Random(writer * 100 + number).sample(agents, 60)
            sequence = number * 8 + writer + 1
            await record(registry, *(update(one, sequence=sequence) for one in chosen))

    async def sweeps() -> None:
        for _ in range(20):
            await sweep(registry)

    await asyncio.gather(*(write(writer) for writer in range(6)), sweeps(), sweeps())

    deadlocks = await database.fetchval(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    assert deadlocks == 0


async def test_a_farewell_without_resources_keeps_the_last_ones(
    registry: Registry, database: Connection
) -> None:
    agent_id = uuid4()
    await record(registry, update(agent_id))

    await record(registry, update(agent_id, sequence=2, status="offline", resources=None))

    kept = await row(database, agent_id)
    assert kept["status"] == "offline"
    assert json.loads(kept["resource_metrics"])["cpu_percent"] == 12.5


async def test_an_agent_that_stops_reporting_resources_has_none(
    registry: Registry, database: Connection
) -> None:
    agent_id = uuid4()
    await record(registry, update(agent_id))

    await record(registry, update(agent_id, sequence=2, resources=None))

    assert (await row(database, agent_id))["resource_metrics"] == "{}"


async def test_a_heartbeat_held_for_longer_than_its_lease_is_let_go_and_a_farewell_is_not(
    registry: Registry, database: Connection
) -> None:
    late = update(interval_seconds=1.0)
    farewell = update(interval_seconds=1.0, status="offline")

    await record(registry, late, farewell, held=lease_for(1.0) + 0.1)

    assert await registry.agents.show(late.agent_id) is None
    assert (await row(database, farewell.agent_id))["status"] == "offline"


@pytest.mark.parametrize("interval", [0.5, 5.0, 60.0])
async def test_silence_is_judged_by_each_agents_own_lease(
    registry: Registry, database: Connection, interval: float
) -> None:
    limit = offline_after(lease_for(interval))
    early, late = update(interval_seconds=interval), update(interval_seconds=interval)
    await record(registry, early, late)
    await prove_path(registry, database, 10_000)
    await make_silent(database, early.agent_id, limit - 1)
    await make_silent(database, late.agent_id, limit + 1)

    silenced = (await sweep(registry)).marked

    assert [one.agent_id for one in silenced] == [late.agent_id]
    assert (await row(database, early.agent_id))["status"] == "online"
    assert (await row(database, late.agent_id))["status"] == "offline"
    assert (await sweep(registry)).marked == []


async def test_nobody_is_judged_while_no_canary_comes_through(
    registry: Registry, database: Connection
) -> None:
    sent = update()
    await record(registry, sent)
    await make_silent(database, sent.agent_id, 10_000)

    assert (await sweep(registry)).marked == []  # no canary ever
    await prove_path(registry, database, 10_000)
    await database.execute(
        "UPDATE ingest_path SET fresh_at = now() - $1 * interval '1 second'",
        CANARY_FRESH_SECONDS + 0.1,
    )
    assert (await sweep(registry)).marked == []  # none lately


async def test_after_a_gap_every_agent_has_its_own_full_lease_again(
    registry: Registry, database: Connection
) -> None:
    quick, slow = update(interval_seconds=1.0), update(interval_seconds=60.0)
    await record(registry, quick, slow)
    for sent in (quick, slow):
        await make_silent(database, sent.agent_id, 10_000)
    await prove_path(registry, database, 10_000)
    await database.execute("UPDATE ingest_path SET fresh_at = now() - interval '6 seconds'")

    await registry.path.mark_fresh(time.monotonic())

    assert (await sweep(registry)).marked == []
    path = await database.fetchrow(
        "SELECT extract(epoch FROM now() - fresh_since)::float8 AS since,"
        " extract(epoch FROM grace_until - now())::float8 AS grace FROM ingest_path"
    )
    assert path is not None
    assert path["since"] < 5
    assert 230 < path["grace"] <= offline_after(lease_for(60.0))

    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '7 seconds'")
    assert [one.agent_id for one in (await sweep(registry)).marked] == [quick.agent_id]


async def test_a_canary_without_a_gap_leaves_the_beginning_alone(
    registry: Registry, database: Connection
) -> None:
    await prove_path(registry, database, 100)
    before = await database.fetchval("SELECT fresh_since FROM ingest_path")

    await registry.path.mark_fresh(time.monotonic())

    assert await database.fetchval("SELECT fresh_since FROM ingest_path") == before


async def test_grace_ends_when_every_agent_has_spoken(
    registry: Registry, database: Connection
) -> None:
    sent = update()
    await record(registry, sent)
    await make_silent(database, sent.agent_id, 100)
    await registry.path.mark_fresh(time.monotonic())
    await sweep(registry)
    assert await database.fetchval("SELECT grace_until > now() FROM ingest_path")

    await record(registry, update(sent.agent_id, sequence=2))
    await sweep(registry)

    assert not await database.fetchval("SELECT grace_until > now() FROM ingest_path")


async def test_two_sweeps_at_once_report_each_transition_once(
    registry: Registry, database: Connection
) -> None:
    agents = [update() for _ in range(200)]
    await record(registry, *agents)
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = now() - interval '1 hour'"
    )
    await prove_path(registry, database, 10_000)

    reports = await asyncio.gather(*(sweep(registry, outage_share=1.0) for _ in range(6)))

    marked = [one.agent_id for report in reports for one in report.marked]
    assert len(marked) == len(set(marked)) == 200


@pytest.mark.parametrize(
    "odd", [{"hostname": "nul\x00"}, {"hostname": "\ud800"}, {"sequence": 2**70}]
)
async def test_a_value_that_cannot_be_stored_is_said_to_be_that(
    registry: Registry, odd: dict[str, Any]
) -> None:
    bad = update().model_copy(update=odd)

    with pytest.raises(RowRefused):
        await record(registry, bad)


async def test_a_database_that_is_away_is_unavailable() -> None:
    async with Registry.open("postgresql://u:p@127.0.0.1:1/x") as registry:
        with pytest.raises(RegistryUnavailable):
            await registry.agents.show(uuid4())


async def test_a_wrong_password_is_a_refusal_without_the_password(database_url: str) -> None:
    user, _, rest = database_url.partition("://")[2].partition(":")
    wrong = f"postgresql://{user}:hunter2@{rest.partition('@')[2]}"

    async with Registry.open(wrong) as registry:
        with pytest.raises(RegistryRefused) as refused:
            await registry.agents.show(uuid4())

    assert "hunter2" not in str(refused.value)


async def test_tables_that_are_not_there_are_named_with_what_to_do(empty_database_url: str) -> None:
    async with Registry.open(empty_database_url) as registry:
        with pytest.raises(RegistryUnavailable, match="chiffon db upgrade"):
            await registry.agents.list()
        assert await registry.revision() is None
