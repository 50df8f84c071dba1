"""Ingest on a real broker and database: what is recorded, and what is set aside."""

import asyncio
import json
import logging
import time
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon.contract.codec import encode, routing_key
from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.servers import Management, Servers, execute, new_database
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

EXCHANGE = "chiffon.heartbeats"
KIND = "status_update.v1"


async def send(to: Any, sent: Any, **properties: Any) -> None:
    await plain.publish(to, EXCHANGE, routing_key(sent), encode(sent), KIND, **properties)


async def recorded(registry: Registry, agent_id: UUID, sequence: int) -> None:
    async def is_there() -> bool:
        row = await registry.agents.show(agent_id)
        return row is not None and row.sequence == sequence

    await until(is_there, f"heartbeat {sequence} of {agent_id} in the registry")


async def drained(amqp_url: str) -> None:
    async def is_empty() -> bool:
        return (await plain.depth(amqp_url, "chiffon.ingest"))[0] == 0

    await until(is_empty, "chiffon.ingest empty")


async def test_what_is_not_json_is_set_aside_with_its_reason_and_ingest_goes_on(
    amqp_url: str, database_url: str, registry: Registry, queues: Queues
) -> None:
    good = update()
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await plain.publish(to, EXCHANGE, "heartbeat.a.b.c", b"not json at all", KIND)
        await send(to, good)
        await recorded(registry, good.agent_id, 1)

    [dead] = queues.take("chiffon.dead-letters")
    headers = dead["properties"]["headers"]
    assert dead["payload"] == b"not json at all"
    assert headers["chiffon-dead-letter"] == "1"
    assert headers["chiffon-reason"].startswith("not JSON: ")
    assert headers["chiffon-exchange"] == EXCHANGE
    assert headers["chiffon-routing-key"] == "heartbeat.a.b.c"
    assert dead["properties"]["type"] == KIND
    assert queues.take("chiffon.ingest") == []


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_bad_message_anywhere_in_a_batch_costs_only_itself(
    amqp_url: str, database_url: str, registry: Registry, queues: Queues, position: int
) -> None:
    good = [update(), update()]
    bodies = [(routing_key(one), encode(one)) for one in good]
    bodies.insert(position, ("heartbeat.x.y.z", b"{}"))
    async with orchestrating(amqp_url, database_url, ingest_batch_seconds=0.3):
        async with plain.channel(amqp_url) as to:
            for key, body in bodies:
                await plain.publish(to, EXCHANGE, key, body, KIND)
        for one in good:
            await recorded(registry, one.agent_id, 1)

    assert [dead["payload"] for dead in queues.take("chiffon.dead-letters")] == [b"{}"]
    assert queues.take("chiffon.ingest") == []


UNFIT: list[tuple[Any, bytes, str]] = [
    ("telegram.v1", b"{}", "type 'telegram.v1' is not"),
    ("whatever.v1", b"{} ", "type 'whatever.v1' is not"),
    (KIND, encode(update()), "does not agree"),
    (KIND, b"x" * 65_537, "65537 bytes; at most 65536"),
    (KIND, b" " * 65_537 + b"{}", "65539 bytes; at most 65536"),
    (KIND, b"\xff\x00", "not JSON"),
]


async def test_what_does_not_fit_is_set_aside_as_it_came_with_its_reason(
    amqp_url: str, database_url: str, queues: Queues
) -> None:
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        for kind, body, _ in UNFIT:
            await plain.publish(to, EXCHANGE, "heartbeat.a.b.c", body, kind)

        async def are_dead() -> bool:
            return (await plain.depth(amqp_url, "chiffon.dead-letters"))[0] == len(UNFIT)

        await until(are_dead, "a dead letter each")

    dead = {
        message["payload"]: message["properties"]["headers"]["chiffon-reason"]
        for message in queues.take("chiffon.dead-letters")
    }
    for _, body, reason in UNFIT:
        assert reason in dead[body]


async def test_dead_letters_that_cannot_be_published_do_not_hold_up_the_good(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    management: Management,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Twenty of them would take 40 s one after the other, more than ``until`` waits."""
    good, later = update(), update()
    vhost = amqp_url.rpartition("/")[2]
    async with orchestrating(amqp_url, database_url, ingest_batch_seconds=0.3):
        management.call("DELETE", f"exchanges/{vhost}/chiffon.dead-letters")
        # What was only deleted would be made again. To this one nobody may publish.
        other = {"type": "headers", "durable": True, "internal": True}
        management.call("PUT", f"exchanges/{vhost}/chiffon.dead-letters", other)
        async with plain.channel(amqp_url) as to:
            for _ in range(20):
                await plain.publish(to, EXCHANGE, "heartbeat.x.y.z", b"{}", KIND)
            await send(to, good)
        await recorded(registry, good.agent_id, 1)
        async with plain.channel(amqp_url) as to:
            await send(to, later)
        await recorded(registry, later.agent_id, 1)

    assert "dead letters are not confirmed" in caplog.text, "the fault was not injected"


async def test_the_newest_of_a_batch_wins_whatever_the_order(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    agent_id = uuid4()
    async with orchestrating(amqp_url, database_url, ingest_batch_seconds=0.3):
        async with plain.channel(amqp_url) as to:
            for sequence in (3, 5, 4, 5, 1):
                await send(to, update(agent_id, sequence=sequence))
        await recorded(registry, agent_id, 5)
        await drained(amqp_url)

    row = await registry.agents.show(agent_id)
    assert row is not None
    assert row.sequence == 5


async def test_a_redelivered_or_older_heartbeat_changes_nothing(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    agent_id = uuid4()
    marker = update()
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await send(to, update(agent_id, sequence=7))
        await recorded(registry, agent_id, 7)
        before = await registry.agents.show(agent_id)
        for sequence in (7, 6):
            await send(to, update(agent_id, sequence=sequence, status="busy"))
        await send(to, marker)
        await recorded(registry, marker.agent_id, 1)

    after = await registry.agents.show(agent_id)
    assert before is not None
    assert after is not None
    assert after.last_heartbeat_at == before.last_heartbeat_at
    assert (after.sequence, after.status) == (7, "online")


async def test_an_earlier_incarnation_that_keeps_coming_is_counted_and_named(
    amqp_url: str, database_url: str, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    agent_id = uuid4()

    async def counted(count: int) -> bool:
        row = await registry.agents.show(agent_id)
        return row is not None and row.lower_incarnations == count

    def told() -> list[str]:
        return [line for line in caplog.messages if "sends heartbeats of an earlier start" in line]

    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await send(to, update(agent_id, incarnation=20))
        await recorded(registry, agent_id, 1)
        with caplog.at_level(logging.WARNING):
            for sequence in (1, 2, 3, 4):
                assert bool(told()) == (sequence > 3), "one or two may be from the queue"
                await send(to, update(agent_id, incarnation=10, sequence=sequence))
                await until(partial(counted, sequence), "one more is counted")

    assert len(told()) == 1
    assert str(agent_id) in told()[0]
    row = await registry.agents.show(agent_id)
    assert row is not None
    assert (row.incarnation, row.sequence) == (20, 1)
    assert row.lower_incarnation_at is not None


async def test_a_forgotten_agent_comes_back_as_a_new_one_whatever_its_incarnation(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    agent_id, unknown = uuid4(), uuid4()
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await send(to, update(agent_id, incarnation=20, sequence=9))
        await recorded(registry, agent_id, 9)
        assert await registry.agents.forget([agent_id, unknown]) == [agent_id]
        assert await registry.agents.show(agent_id) is None
        await send(to, update(agent_id, incarnation=10, sequence=1))
        await recorded(registry, agent_id, 1)


async def test_heartbeats_that_outlived_their_lease_in_the_queue_are_no_dead_letters(
    amqp_url: str, broker: str, database_url: str, registry: Registry, queues: Queues
) -> None:
    late, farewell = update(), update(status="offline")
    async with plain.channel(amqp_url) as to:
        await send(to, late, expiration=0.2)
        await send(to, farewell)
        await asyncio.sleep(0.5)  # the time that the message must wait is what is tested

    async with orchestrating(amqp_url, database_url):
        await recorded(registry, farewell.agent_id, 1)

    assert await registry.agents.show(late.agent_id) is None
    assert queues.take("chiffon.dead-letters") == []


async def test_heartbeats_that_outlived_their_lease_in_our_memory_do_not_raise_the_dead(
    amqp_url: str, database_url: str, registry: Registry, database: "asyncpg.Connection[Any]"
) -> None:
    """The table is locked for longer than a lease, with three heartbeats in our hands."""
    quick, slow = update(interval_seconds=0.5), update(interval_seconds=60.0)
    farewell = update(interval_seconds=0.5, status="offline")
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        lock = database.transaction()
        await lock.start()
        await database.execute("LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
        for sent in (quick, slow, farewell):
            await send(to, sent)
        await drained(amqp_url)
        await asyncio.sleep(6)  # a lease of 5 s, spent in our memory
        await lock.rollback()
        await recorded(registry, slow.agent_id, 1)
        await recorded(registry, farewell.agent_id, 1)

    row = await registry.agents.show(slow.agent_id)
    assert row is not None
    assert row.age_seconds is not None
    assert row.age_seconds > 5.5, "its age counts from receipt, not from the commit"
    assert await registry.agents.show(quick.agent_id) is None


async def test_a_database_that_was_away_loses_nothing(
    amqp_url: str, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    """The database lets nobody in for a while, and ends who is in."""
    sent = [update(interval_seconds=60.0) for _ in range(20)]
    async with new_database(servers, migrated=True) as url:
        name = url.rpartition("/")[2]
        async with orchestrating(amqp_url, url), plain.channel(amqp_url) as to:
            await send(to, sent[0])
            async with Registry.open(url) as registry:
                await recorded(registry, sent[0].agent_id, 1)
            await execute(servers.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await execute(
                servers.database_url,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            for one in sent[1:]:
                await send(to, one)
            await until(_async(lambda: "trying again" in caplog.text), "the trouble is told")

            await execute(servers.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

            async with Registry.open(url) as registry:
                for one in sent:
                    await recorded(registry, one.agent_id, 1)
        assert (await plain.depth(amqp_url, "chiffon.ingest"))[0] == 0


def _async(condition: Any) -> Any:
    async def check() -> bool:
        return bool(condition())

    return check


async def test_a_row_that_only_the_database_refuses_is_set_aside_alone(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    database: "asyncpg.Connection[Any]",
    queues: Queues,
) -> None:
    await database.execute(
        "ALTER TABLE agent_registry ADD CONSTRAINT picky CHECK (hostname <> 'odd')"
    )
    odd, good = update(hostname="odd"), update()
    async with orchestrating(amqp_url, database_url, ingest_batch_seconds=0.3):
        async with plain.channel(amqp_url) as to:
            await send(to, odd)
            await send(to, good)
        await recorded(registry, good.agent_id, 1)

    [dead] = queues.take("chiffon.dead-letters")
    assert json.loads(dead["payload"])["hostname"] == "odd"
    assert "picky" in dead["properties"]["headers"]["chiffon-reason"]


async def test_a_cut_connection_loses_nothing(
    amqp_url: str, database_url: str, registry: Registry, management: Management
) -> None:
    """The broker lists a new connection after a second, and only then can it be cut."""
    sent = [update(interval_seconds=60.0) for _ in range(200)]
    async with orchestrating(amqp_url, database_url):
        async with plain.channel(amqp_url) as to:
            for position, one in enumerate(sent):
                await send(to, one)
                if position == 100:
                    cut = await plain.cut(management, amqp_url, "consumes")
        for one in sent:
            await recorded(registry, one.agent_id, 1)
        await drained(amqp_url)

    assert cut >= 1, "the fault was not injected"


async def test_a_deleted_queue_is_declared_and_consumed_again(
    amqp_url: str, database_url: str, registry: Registry, management: Management
) -> None:
    sent = update()
    async with orchestrating(amqp_url, database_url):
        first = update()
        async with plain.channel(amqp_url) as to:
            await send(to, first)
            await recorded(registry, first.agent_id, 1)
        management.call("DELETE", f"queues/{amqp_url.rpartition('/')[2]}/chiffon.ingest")

        async def is_consumed() -> bool:
            try:
                return (await plain.depth(amqp_url, "chiffon.ingest"))[1] == 1
            except Exception:
                return False

        await until(is_consumed, "a consumer on the new queue")
        async with plain.channel(amqp_url) as to:
            await send(to, sent)
        await recorded(registry, sent.agent_id, 1)


async def test_stopping_finishes_what_was_delivered(
    amqp_url: str, database_url: str, registry: Registry, queues: Queues
) -> None:
    sent = [update() for _ in range(300)]
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await asyncio.gather(*(send(to, one) for one in sent))

    kept = {row.agent_id for row in await registry.agents.list()}
    left = queues.take("chiffon.ingest", 500, put_back=True)  # a canary may be among them
    assert len(kept) + sum(one["properties"]["type"] == KIND for one in left) == 300
    async with orchestrating(amqp_url, database_url):
        for one in sent:
            await recorded(registry, one.agent_id, 1)


async def test_what_the_parser_takes_the_database_takes(database_url: str) -> None:
    """Odd but allowed values, all in one batch: PostgreSQL itself is the judge."""
    from chiffon.registry.rows import Received

    odd = [
        update(hostname=""),
        update(hostname="ключ \U0001f600 'quoted' \"twice\" \\ % {}"),
        update(sent_at="1970-01-01T00:00:00+14:00"),
        update(sent_at="9000-12-31T23:59:59.999999-12:00"),
        update(incarnation=2**53 - 1, sequence=2**53 - 1),
        update(capabilities=[f"c{number}" for number in range(64)]),
        update(resources={"gpu_vram_total_gb": 2.0**40, "gpu_vram_available_gb": 1e-300}),
        update(resources={"cpu_load_1min": 5e-324, "cpu_cores_available": 1_000_000}),
        update(resources={"probe_errors": ["\U0010ffff" * 512]}),
    ]
    odd.sort(key=lambda one: one.agent_id)
    async with Registry.open(asyncpg_url(database_url)) as registry:
        recorded = await registry.heartbeats.record(
            [Received(one, time.monotonic()) for one in odd]
        )
        assert recorded.stale == []
        assert len(await registry.agents.list()) == len(odd)
