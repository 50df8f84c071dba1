"""Several queues of heartbeats, and changing their number, on a real broker and database."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from chiffon import BaseAgent, PlannerClient
from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import declare, declare_exchange
from chiffon.contract.codec import encode, routing_key
from chiffon.contract.topology import Exchange, Topology
from chiffon.errors import BadConfiguration, TopologyMissing
from chiffon.registry.registry import Registry
from chiffon.settings import load
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.resources import FixedResources
from tests.fixtures.servers import Management
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

HEARTBEATS = "chiffon.heartbeats"
KIND = "status_update.v1"


async def is_degraded(planner: PlannerClient) -> bool:
    return (await planner.find()).degraded


async def test_heartbeats_are_shared_out_and_those_of_an_agent_stay_together(
    amqp_url: str, queues: Queues
) -> None:
    """Every shard has to be proven first."""
    connection = await dial_any(amqp_url, "test")
    await declare(connection, Topology.of(3))
    await connection.close()
    sent = [update() for _ in range(300)]
    async with plain.channel(amqp_url) as to:
        for one in (*sent, *sent):
            await plain.publish(to, HEARTBEATS, routing_key(one), encode(one), KIND)

    found = [
        [message["routing_key"] for message in queues.take(f"chiffon.ingest.{shard}-of-3", 600)]
        for shard in (1, 2, 3)
    ]

    assert sum(map(len, found)) == 600
    assert all(len(keys) > 100 for keys in found), "a third is 200"
    assert sum(len(set(keys)) for keys in found) == len(sent), "no agent came by two queues"


async def test_orchestrators_of_one_shard_each_record_the_whole_fleet(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    sent = [update() for _ in range(40)]
    async with (
        orchestrating(amqp_url, database_url, ingest_shards=2, ingest_shard=1),
        orchestrating(amqp_url, database_url, ingest_shards=2, ingest_shard=2),
        plain.channel(amqp_url) as to,
        PlannerClient.open(amqp_url) as planner,
    ):
        for one in sent:
            await plain.publish(to, HEARTBEATS, routing_key(one), encode(one), KIND)

        async def all_are_there() -> bool:
            return len(await registry.agents.list()) == len(sent)

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(all_are_there, "every agent in the registry")
        await until(is_whole, "both shards and their exchange proven")


@pytest.mark.deep
async def test_a_shard_that_nobody_reads_is_our_trouble_and_not_its_agents(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """Leases are 5 s: those of the shard that is not read are all over, and nobody is marked."""
    async with AsyncExitStack() as stack:
        two = {"ingest_shards": 2}
        await stack.enter_async_context(
            orchestrating(amqp_url, database_url, **two, ingest_shard=1)
        )
        planner = await stack.enter_async_context(PlannerClient.open(amqp_url))
        agents = [
            await stack.enter_async_context(
                BaseAgent(amqp_url, interval_seconds=0.5, resources=FixedResources())
            )
            for _ in range(12)
        ]

        async def heard() -> set[UUID]:
            return {
                row.agent_id
                for row in await registry.agents.list()
                if row.age_seconds is not None and row.age_seconds < 3.0
            }

        async def all_are_heard() -> bool:
            return len(await heard()) == len(agents)

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        async with orchestrating(amqp_url, database_url, **two, ingest_shard=2):
            await until(all_are_heard, "all agents")
            await until(is_whole, "an answer that is not degraded")
        # The lease and the time to dial again, from the last heartbeat that was read.
        await asyncio.sleep(5.0 * 4 / 3 + 2)
        rows = {row.agent_id: row for row in await registry.agents.list()}
        assert 0 < len(await heard()) < len(agents), "one shard is read and the other is not"
        assert {row.status for row in rows.values()} == {"online"}
        assert await is_degraded(planner)

        await stack.enter_async_context(
            orchestrating(amqp_url, database_url, **two, ingest_shard=2)
        )
        await until(all_are_heard, "all agents again")
        await until(is_whole, "an answer that is not degraded again")


async def test_an_exchange_that_is_not_bound_any_more_degrades_answers(
    amqp_url: str, database_url: str, management: Management
) -> None:
    """The path counts as proven for 5 s after its last canary."""
    vhost = amqp_url.rpartition("/")[2]
    async with (
        orchestrating(amqp_url, database_url, ingest_shards=2),
        PlannerClient.open(amqp_url) as planner,
    ):

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(is_whole, "an answer that is not degraded")
        path = f"bindings/{vhost}/e/chiffon.heartbeats/e/chiffon.shards.2"
        [binding] = management.call("GET", path)
        management.call("DELETE", f"{path}/{binding['properties_key']}")
        await until(lambda: is_degraded(planner), "a degraded answer")


@pytest.mark.deep
async def test_another_number_of_shards_takes_over_as_the_documentation_says(
    amqp_url: str, database_url: str, management: Management, registry: Registry
) -> None:
    """Nobody is marked offline, and answers are whole at the end; a lease is waited for."""
    vhost = amqp_url.rpartition("/")[2]
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(AsyncExitStack())
        await old.enter_async_context(orchestrating(amqp_url, database_url, ingest_shards=2))
        planner = await stack.enter_async_context(PlannerClient.open(amqp_url))
        agents = [
            await stack.enter_async_context(
                BaseAgent(amqp_url, interval_seconds=0.5, resources=FixedResources())
            )
            for _ in range(12)
        ]

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(is_whole, "an answer that is not degraded")
        await stack.enter_async_context(orchestrating(amqp_url, database_url, ingest_shards=3))
        management.call("DELETE", f"exchanges/{vhost}/chiffon.shards.2")

        async def are_empty() -> bool:
            names = (f"chiffon.ingest.{number}-of-2" for number in (1, 2))
            found = [management.call("GET", f"queues/{vhost}/{name}") for name in names]
            return all(one.get("messages", 9) <= 2 for one in found)

        await until(are_empty, "old queues with canaries at most")
        await old.aclose()
        for number in (1, 2):
            management.call("DELETE", f"queues/{vhost}/chiffon.ingest.{number}-of-2")
        await asyncio.sleep(5.0 * 4 / 3 + 2)
        rows = await registry.agents.list()

        assert len(rows) == len(agents)
        assert all(row.age_seconds is not None and row.age_seconds < 3.0 for row in rows)
        assert not await is_degraded(planner)


@pytest.mark.deep
async def test_queues_of_another_number_that_nobody_reads_take_nothing_from_the_others(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """As when somebody declares them before there are orchestrators for them."""
    two = {"ingest_shards": 2}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(orchestrating(amqp_url, database_url, **two))
        planner = await stack.enter_async_context(PlannerClient.open(amqp_url))
        agents = [
            await stack.enter_async_context(
                BaseAgent(amqp_url, interval_seconds=0.5, resources=FixedResources())
            )
            for _ in range(12)
        ]

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(is_whole, "an answer that is not degraded")
        connection = await dial_any(amqp_url, "test")
        await declare(connection, Topology.of(3))
        await connection.close()
        await asyncio.sleep(5.0 * 4 / 3 + 2)  # a lease and the time to dial again
        rows = await registry.agents.list()

        assert len(rows) == len(agents)
        assert all(row.age_seconds is not None and row.age_seconds < 3.0 for row in rows)
        assert not await is_degraded(planner)


async def test_a_clock_that_was_set_back_does_not_prove_a_path_of_which_a_part_is_not_read(
    registry: Registry, database: "asyncpg.Connection[Any]"
) -> None:
    whole = ("shared", "one", "two")
    for part in whole:
        await registry.path.mark_fresh(time.monotonic(), part=part, path=whole)
    assert not (await registry.agents.summary()).degraded
    # Seen from an hour before.
    later = "SET {0} = {0} + interval '1 hour'"
    await database.execute(f"UPDATE ingest_path {later.format('fresh_at')}")
    await database.execute(f"UPDATE ingest_part {later.format('fresh_at')}")

    for part in ("shared", "one"):
        await registry.path.mark_fresh(time.monotonic(), part=part, path=whole)
    assert (await registry.agents.summary()).degraded
    await registry.path.mark_fresh(time.monotonic(), part="two", path=whole)

    fresh = await database.fetchval("SELECT now() - fresh_at < interval '1 s' FROM ingest_path")
    assert fresh


async def test_a_path_is_as_fresh_as_the_least_fresh_of_its_parts(registry: Registry) -> None:
    whole = ("shared", "one", "two")
    now = time.monotonic()
    for part in whole[:2]:
        await registry.path.mark_fresh(now, part=part, path=whole)
    assert (await registry.agents.summary()).degraded, "one was never proven"
    await registry.path.mark_fresh(now - 6.0, part="two", path=whole)
    assert (await registry.agents.summary()).degraded, "it was held for too long to prove anything"
    await registry.path.mark_fresh(now, part="two", path=whole)
    assert not (await registry.agents.summary()).degraded


async def test_a_broker_without_the_plugin_is_told_apart(amqp_url: str) -> None:
    connection = await dial_any(amqp_url, "test")
    channel = await connection.channel()

    with pytest.raises(TopologyMissing, match="rabbitmq-plugins enable rabbitmq_consistent_hash"):
        await declare_exchange(channel, Exchange("chiffon.shards.2", "x-there-is-none"))
    await connection.close()


def test_a_shard_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIFFON_INGEST_SHARDS", "2")
    monkeypatch.setenv("CHIFFON_INGEST_SHARD", "3")

    with pytest.raises(BadConfiguration, match="CHIFFON_INGEST_SHARD: there is no shard 3 of 2"):
        load()
