"""The lines between agents and broker are slow, cut, half-open, and all dialled at once."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from chiffon import BaseAgent, PlannerClient
from chiffon.contract.messages import FleetEvent
from tests.faults.conftest import Survives
from tests.faults.lab import INTERVAL_SECONDS, Lab
from tests.fixtures.resources import FixedResources
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

HERD = 200


@pytest.mark.parametrize("latency_seconds", [0.2, 1.0])
async def test_they_are_slow(lab: Lab, survives: Survives, latency_seconds: float) -> None:
    async def fault() -> None:
        before = lab.beats()
        lab.proxy.latency_seconds = latency_seconds
        await asyncio.sleep(8)
        slow = lab.beats() - before
        assert slow < 8 / INTERVAL_SECONDS * len(lab.agents), "nothing was slower"
        lab.proxy.latency_seconds = 0.0

    # The slower ones need 2 s for a confirm and eight to dial, longer than a lease: an agent that a
    # busy machine holds up for another second gives its connection up.
    is_too_slow = latency_seconds >= 1
    await survives(
        lab,
        f"lines slower by {latency_seconds:g} s each way",
        fault,
        outlasts_leases=is_too_slow,
    )


async def test_they_are_reset_in_the_middle_of_frames(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        resets = lab.proxy.resets
        lab.proxy.resets_after_bytes = 40
        await asyncio.sleep(3)
        lab.proxy.resets_after_bytes = None
        assert lab.proxy.resets - resets > len(lab.agents)

    await survives(lab, "lines reset mid-frame for 3 s", fault)


@pytest.mark.essential
async def test_they_are_open_and_swallow_everything(lab: Lab, survives: Survives) -> None:
    """An agent whose heartbeat is not confirmed within 3 s dials again, before its lease is over.

    The line is whole again by then: who dialled into a dead one would need another three seconds.
    """

    async def fault() -> None:
        swallowed = lab.proxy.swallowed_bytes
        lab.proxy.swallows = True
        await asyncio.sleep(2.5)
        lab.proxy.swallows = False
        assert lab.proxy.swallowed_bytes > swallowed

    await survives(lab, "half-open lines for 2.5 s", fault)


async def test_all_agents_are_cut_off_for_longer_than_a_lease(lab: Lab, survives: Survives) -> None:
    """The path is proven, only the agents are silent: one outage, not forty transitions."""
    async with PlannerClient.open(lab.amqp_url) as planner, planner.watch() as events:
        told: list[str] = []

        async def follow() -> None:
            async for event in events:
                if isinstance(event, FleetEvent) and event.pool_name == "default":
                    told.append(event.state)

        async def is_told(state: str) -> bool:
            return state in told

        async def is_sound() -> bool:
            return not (await planner.find()).degraded

        async def fault() -> None:
            await until(is_sound, "an answer that is not degraded, before")
            lab.proxy.swallows = True
            await until(lambda: is_told("degraded"), "the outage is told")
            assert not await is_sound()
            await asyncio.sleep(8)  # more than it takes to mark the silent
            lab.proxy.swallows = False

        following = asyncio.create_task(follow())
        try:
            report = await survives(lab, "every agent cut off for 12 s", fault)
            await until(lambda: is_told("recovered"), "its end is told")
        finally:
            following.cancel()
            await asyncio.wait({following})

    assert told == ["degraded", "recovered"]
    assert report.outlasted <= 0.55 * len(lab.agents)


async def test_a_herd_dials_at_once(lab: Lab, survives: Survives) -> None:
    async with AsyncExitStack() as stack:
        herd = [
            await stack.enter_async_context(
                BaseAgent(lab.amqp_url, pool_name="herd", resources=FixedResources())
            )
            for _ in range(HERD)
        ]

        async def all_are_online() -> bool:
            rows = await lab.rows()
            return all(
                (row := rows.get(agent.identity.agent_id)) is not None and row["status"] == "online"
                for agent in herd
            )

        await until(all_are_online, "the herd in the registry", 60)

        async def fault() -> None:
            before = {agent: agent._supervised.connections_made for agent in herd}

            async def all_are_back() -> bool:
                return all(
                    agent._supervised.current is not None
                    and agent._supervised.connections_made > made
                    for agent, made in before.items()
                )

            close = ("close_all_connections", "-p", "chiffon", "a test")
            await asyncio.to_thread(lab.rabbitmqctl, *close)
            await until(all_are_back, "every agent of the herd on a new connection", 60)

        await survives(lab, f"{HERD + len(lab.agents)} agents dial at once", fault)
        assert await all_are_online()
