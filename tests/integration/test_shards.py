"""Several queues of heartbeats, and changing their number, on a real broker and database."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from chiffon.agent import BaseAgent
from chiffon.encoding import encode, routing_key
from chiffon.errors import BadConfiguration, TopologyMissing
from chiffon.planner import PlannerClient
from chiffon.provisioning import check, declare, declare_exchange
from chiffon.registry import Registry
from chiffon.resharding import Left, retire, retire_all
from chiffon.session import dial_any
from chiffon.settings import load
from chiffon.topology import Exchange, Topology
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.resources import NoResources
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
    session = await dial_any(amqp_url, "test")
    await declare(session, Topology.of(3))
    await session.close()
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
            return len(await registry.list_agents()) == len(sent)

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(all_are_there, "every agent in the registry")
        await until(is_whole, "both shards and their exchange proven")


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
                BaseAgent(amqp_url, interval_seconds=0.5, resources=NoResources())
            )
            for _ in range(12)
        ]

        async def heard() -> set[UUID]:
            return {
                row.agent_id
                for row in await registry.list_agents()
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
        rows = {row.agent_id: row for row in await registry.list_agents()}
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


class Traffic:
    """A fleet that speaks without a pause; now and then an agent leaves for good."""

    def __init__(self) -> None:
        self.confirmed: dict[UUID, int] = {}
        self.left: list[UUID] = []

    async def run(self, to: Any) -> None:
        """Publish until cancelled."""
        fleet = [update(interval_seconds=60.0) for _ in range(20)]
        while True:
            for number, one in enumerate(fleet):
                await plain.publish(to, HEARTBEATS, routing_key(one), encode(one), KIND)
                self.confirmed[one.agent_id] = one.sequence
                if one.is_farewell:
                    self.left.append(one.agent_id)
                    fleet[number] = update(interval_seconds=60.0)
                    continue
                sequence = one.sequence + 1
                is_last = number % 10 == 0 and sequence % 5 == 0
                change = {"sequence": sequence, "status": "offline" if is_last else "online"}
                fleet[number] = one.model_copy(update=change)

    async def left_more(self, count: int) -> None:
        """Wait until so many more have left."""
        wanted = len(self.left) + count

        async def have_left() -> bool:
            return len(self.left) >= wanted

        await until(have_left, f"{count} more farewells")

    async def is_recorded(self, registry: Registry) -> bool:
        """Return whether the registry has what was confirmed, farewells included."""
        rows = {row.agent_id: row for row in await registry.list_agents()}
        return all(
            (row := rows.get(agent_id)) is not None and (row.sequence or 0) >= sequence
            for agent_id, sequence in self.confirmed.items()
        ) and all(rows[agent_id].status == "offline" for agent_id in self.left)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (3, 2), (2, 1)])
async def test_the_number_of_shards_is_changed_under_traffic_and_nothing_is_lost(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    queues: Queues,
    management: Management,
    old: int,
    new: int,
) -> None:
    told: list[list[Left]] = []
    traffic = Traffic()

    async def dial() -> Any:
        return await dial_any(amqp_url, "test retires")

    async def is_unbound() -> bool:
        return bool(told)

    async with AsyncExitStack() as stack, plain.channel(amqp_url) as to:
        before = await stack.enter_async_context(AsyncExitStack())
        await before.enter_async_context(orchestrating(amqp_url, database_url, ingest_shards=old))
        speaking = asyncio.create_task(traffic.run(to))
        await stack.enter_async_context(orchestrating(amqp_url, database_url, ingest_shards=new))
        retiring = asyncio.create_task(
            retire_all(dial, Topology.of(old), Topology.of(new), told.append)
        )
        await until(is_unbound, "the old queues are unbound, and wait for their orchestrator")
        await traffic.left_more(3)
        assert not retiring.done()
        await before.aclose()
        await asyncio.wait_for(retiring, 30)
        await traffic.left_more(3)
        speaking.cancel()
        await asyncio.wait({speaking})
        await until(lambda: traffic.is_recorded(registry), "what was confirmed")

    assert {one.consumers for one in told[-1]} == {1}, "it waited for the old orchestrator"
    names = [name for name in queues.names() if name.startswith("chiffon.ingest")]
    assert sorted(names) == sorted(Topology.of(new).ingest)
    exchanges = management.call("GET", f"exchanges/{amqp_url.rpartition('/')[2]}")
    shared = {one["name"] for one in exchanges if one["name"].startswith("chiffon.shards")}
    assert shared == ({f"chiffon.shards.{new}"} if new > 1 else set())
    assert {one.verdict for one in await check(dial, Topology.of(new))} == {"ok"}


async def test_nothing_is_retired_before_there_is_something_new(broker: str) -> None:
    async def dial() -> Any:
        return await dial_any(broker, "test")

    session = await dial()
    await declare(session, Topology.of(2))
    await session.close()
    with pytest.raises(TopologyMissing, match=r"nobody consumes .*First start orchestrators"):
        await retire(dial, Topology.of(1), Topology.of(2))
    assert {one.verdict for one in await check(dial)} == {"ok"}


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
                BaseAgent(amqp_url, interval_seconds=0.5, resources=NoResources())
            )
            for _ in range(12)
        ]

        async def is_whole() -> bool:
            return not await is_degraded(planner)

        await until(is_whole, "an answer that is not degraded")
        session = await dial_any(amqp_url, "test")
        await declare(session, Topology.of(3))
        await session.close()
        await asyncio.sleep(5.0 * 4 / 3 + 2)  # a lease and the time to dial again
        rows = await registry.list_agents()

        assert len(rows) == len(agents)
        assert all(row.age_seconds is not None and row.age_seconds < 3.0 for row in rows)
        assert not await is_degraded(planner)


async def test_a_clock_that_was_set_back_does_not_prove_a_path_of_which_a_part_is_not_read(
    registry: Registry, database: "asyncpg.Connection[Any]"
) -> None:
    whole = ("shared", "one", "two")
    for part in whole:
        await registry.mark_path_fresh(time.monotonic(), part=part, path=whole)
    assert not (await registry.summary()).degraded
    # Seen from an hour before.
    later = "SET {0} = {0} + interval '1 hour'"
    await database.execute(f"UPDATE ingest_path {later.format('fresh_at')}")
    await database.execute(f"UPDATE ingest_part {later.format('fresh_at')}")

    for part in ("shared", "one"):
        await registry.mark_path_fresh(time.monotonic(), part=part, path=whole)
    assert (await registry.summary()).degraded
    await registry.mark_path_fresh(time.monotonic(), part="two", path=whole)

    fresh = await database.fetchval("SELECT now() - fresh_at < interval '1 s' FROM ingest_path")
    assert fresh


async def test_a_path_is_as_fresh_as_the_least_fresh_of_its_parts(registry: Registry) -> None:
    whole = ("shared", "one", "two")
    now = time.monotonic()
    for part in whole[:2]:
        await registry.mark_path_fresh(now, part=part, path=whole)
    assert (await registry.summary()).degraded, "one was never proven"
    await registry.mark_path_fresh(now - 6.0, part="two", path=whole)
    assert (await registry.summary()).degraded, "it was held for too long to prove anything"
    await registry.mark_path_fresh(now, part="two", path=whole)
    assert not (await registry.summary()).degraded


async def test_a_broker_without_the_plugin_is_told_apart(amqp_url: str) -> None:
    session = await dial_any(amqp_url, "test")
    channel = await session.channel()

    with pytest.raises(TopologyMissing, match="rabbitmq-plugins enable rabbitmq_consistent_hash"):
        await declare_exchange(channel, Exchange("chiffon.shards.2", "x-there-is-none"))
    await session.close()


def test_a_shard_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIFFON_INGEST_SHARDS", "2")
    monkeypatch.setenv("CHIFFON_INGEST_SHARD", "3")

    with pytest.raises(BadConfiguration, match="CHIFFON_INGEST_SHARD: there is no shard 3 of 2"):
        load()
