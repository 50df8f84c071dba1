"""What orchestrators tell of the fleet, as somebody who follows it sees it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from chiffon import BaseAgent, PlannerClient
from chiffon.amqp.connection import dial_any
from chiffon.contract.messages import AgentEvent, CapacityQuery
from chiffon.orchestrator import connection_events
from chiffon.orchestrator.connection_events import ConnectionEvents
from chiffon.planner.events import Event
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.servers import Management
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until


async def next_event(events: AsyncIterator[Event]) -> Event:
    async with asyncio.timeout(30):
        return await anext(events)


async def next_of(events: AsyncIterator[Event], agent_id: object) -> AgentEvent:
    while True:
        event = await next_event(events)
        if isinstance(event, AgentEvent) and event.agent_id == agent_id:
            return event


@pytest.fixture
def following(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Waits until the orchestrators of the test follow the broker's own events."""
    made: list[ConnectionEvents] = []
    original = ConnectionEvents.__init__

    def remember(self: ConnectionEvents, *arguments: Any) -> None:
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(ConnectionEvents, "__init__", remember)

    async def wait() -> None:
        async def all_follow() -> bool:
            return bool(made) and all(one.is_following for one in made)

        await until(all_follow, "the broker's events are followed")

    return wait


@pytest.fixture
def own_events(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker tells of connections in its default virtual host, which is not the test's."""
    default = f"{amqp_url.rpartition('/')[0]}/chiffon"
    original = dial_any

    async def dial_default(_: str, name: str) -> Any:
        return await original(default, name)

    monkeypatch.setattr(connection_events, "dial_any", dial_default)


async def test_agents_that_come_and_go_are_told_with_the_reason(
    amqp_url: str, database_url: str
) -> None:
    async with (
        orchestrating(amqp_url, database_url),
        PlannerClient.open(amqp_url) as planner,
        planner.watch() as events,
    ):
        async with BaseAgent(amqp_url, hostname="rig-7", pool_name="lab") as agent:
            came = await next_event(events)
            agent.status = "busy"
            busy = await next_event(events)
        left = await next_event(events)

    assert isinstance(came, AgentEvent)
    assert (came.agent_id, came.status, came.reason) == (agent.identity.agent_id, "online", None)
    assert (came.hostname, came.pool_name) == ("rig-7", "lab")
    assert isinstance(busy, AgentEvent)
    assert isinstance(left, AgentEvent)
    assert (busy.status, left.status, left.reason) == ("busy", "offline", "farewell")


async def test_events_go_on_after_somebody_deleted_their_exchange(
    amqp_url: str, database_url: str
) -> None:
    """The connection is dialled again after its channel was closed."""
    async with (
        orchestrating(amqp_url, database_url),
        plain.channel(amqp_url) as channel,
        PlannerClient.open(amqp_url) as planner,
    ):
        await channel.exchange_delete("chiffon.events")
        async with BaseAgent(amqp_url) as agent, planner.watch(agent.identity.agent_id) as events:
            agent.status = "busy"
            while (await next_event(events)).status != "busy":  # type: ignore[union-attr]
                pass


async def test_one_agent_may_be_followed_alone(amqp_url: str, database_url: str) -> None:
    async with orchestrating(amqp_url, database_url), PlannerClient.open(amqp_url) as planner:
        wanted = BaseAgent(amqp_url)
        async with planner.watch(wanted.identity.agent_id) as events, BaseAgent(amqp_url), wanted:
            event = await next_event(events)

    assert isinstance(event, AgentEvent)
    assert event.agent_id == wanted.identity.agent_id


AGENT = """
import asyncio, sys
from chiffon import BaseAgent

async def main():
    async with BaseAgent(sys.argv[1], interval_seconds=60.0) as agent:
        print(agent.identity.agent_id, flush=True)
        await agent.wait()

asyncio.run(main())
"""


@pytest.mark.usefixtures("own_events")
async def test_a_killed_agent_is_not_offered_long_before_its_lease_is_over(
    amqp_url: str, database_url: str, registry: Registry, following: Callable[[], Any]
) -> None:
    """Its lease is three minutes, which decides when it is offline."""
    async with (
        orchestrating(amqp_url, database_url),
        PlannerClient.open(amqp_url) as planner,
        planner.watch() as events,
    ):
        await following()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            AGENT,
            amqp_url,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=dict(os.environ),
        )
        assert process.stdout is not None
        came = await next_event(events)
        assert isinstance(came, AgentEvent)
        assert came.status == "online"

        async def is_offered() -> bool:
            offers = await planner.find(CapacityQuery(min_cpu_cores=0))
            return [offer.agent_id for offer in offers.agents] == [came.agent_id]

        async def is_not_offered() -> bool:
            return not await is_offered()

        await until(is_offered, "an offer of it")
        process.kill()
        await process.wait()
        await until(is_not_offered, "no offer of it")
        row = await registry.agents.show(came.agent_id)

    assert row is not None
    assert (row.status, row.is_silent) == ("online", True)


@pytest.mark.usefixtures("own_events")
async def test_an_agent_that_dials_again_does_not_flap(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    management: Management,
    following: Callable[[], Any],
) -> None:
    """The broker lists a new connection after a second, and only then can it be cut."""
    async with (
        orchestrating(amqp_url, database_url),
        PlannerClient.open(amqp_url) as planner,
        planner.watch() as events,
    ):
        await following()
        async with BaseAgent(amqp_url, interval_seconds=60.0) as agent:
            assert (await next_event(events)) is not None
            for sequence in (2, 3):
                await plain.cut(management, amqp_url, str(agent.identity.agent_id))

                async def is_heard_again(sequence: int = sequence) -> bool:
                    row = await registry.agents.show(agent.identity.agent_id)
                    return row is not None and row.sequence >= sequence

                await until(is_heard_again, "a heartbeat over the new connection")
            await asyncio.sleep(connection_events.SETTLE_SECONDS + 1.5)
            row = await registry.agents.show(agent.identity.agent_id)
        left = await next_event(events)

    assert row is not None
    assert row.status == "online"
    assert isinstance(left, AgentEvent)
    assert left.reason == "farewell", "nothing was told between the first and the last"


async def test_without_the_plugin_nothing_changes_but_the_speed(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """There is no such exchange in the test's virtual host."""
    async with orchestrating(amqp_url, database_url), BaseAgent(amqp_url) as agent:

        async def is_online() -> bool:
            row = await registry.agents.show(agent.identity.agent_id)
            return row is not None and row.status == "online"

        await until(is_online, "the agent online")
