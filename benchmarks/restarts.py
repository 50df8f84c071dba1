"""False offlines through restarts of each component, and how soon a death is noticed.

    python -m benchmarks.restarts --agents 1000 --restarts 20

A thousand agents with a connection each, two orchestrators, a private RabbitMQ and PostgreSQL.
Each component is killed (-9) and started again, again and again; what the database saw is
compared with what agents did. Then agents die one by one, by silence and by a cut connection.
"""

import argparse
import asyncio
import gc
import logging
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

from chiffon import BaseAgent, PlannerClient
from chiffon.contract.lease import lease_for
from chiffon.contract.messages import AgentEvent, CapacityQuery
from chiffon.planner.events import Event
from tests.faults.checker import Report, suffer
from tests.faults.lab import Lab, kill, opened
from tests.fixtures.proxy import Proxy
from tests.fixtures.resources import FixedResources
from tests.fixtures.waiting import until

DEATHS = 60
SHORT_INTERVAL_SECONDS = 0.5
LONG_INTERVAL_SECONDS = 60.0


COMPONENTS = ("orchestrator", "broker", "database")


async def measure(folder: Path, agents: int, restarts: int, components: Sequence[str]) -> None:
    """Start the system, restart its parts, let agents die, and print what came of it."""
    async with opened(folder, count=agents, interval_seconds=5.0) as lab:
        await _restart_all(lab, restarts, components)
        await _die_one_by_one(lab)


async def _restart_all(lab: Lab, restarts: int, components: Sequence[str]) -> None:
    async def orchestrator() -> None:
        kill(lab.orchestrators.pop(0))
        lab.start_orchestrator()

    async def broker() -> None:
        lab.broker.kill()
        lab.broker.start()

    async def database() -> None:
        lab.database.kill()
        lab.database.start()

    faults: dict[str, Callable[[], Awaitable[None]]] = dict(
        zip(COMPONENTS, (orchestrator, broker, database), strict=True)
    )
    print(f"{restarts} restarts of each component (kill -9), {len(lab.agents)} agents")
    print(f"{'COMPONENT':<14}{'FALSE OFFLINES':>15}{'LOST':>6}{'RECOVERY, MEDIAN':>18}{'MOST':>8}")
    for name in components:
        reports = []
        for _ in range(restarts):
            reports.append(await suffer(lab, faults[name]))
            gc.collect()
        _print(name, reports)


def _print(name: str, reports: list[Report]) -> None:
    seconds = [one.recovery_seconds for one in reports]
    print(
        f"{name:<14}{sum(one.false_offlines for one in reports):>15}"
        f"{sum(one.lost for one in reports):>6}{statistics.median(seconds):>16.1f} s"
        f"{max(seconds):>6.1f} s",
        flush=True,
    )
    for number, one in enumerate(reports, 1):
        if one.false_offlines:
            print(f"  restart {number}: {one.false_offlines} offline: {', '.join(one.reasons)}")


async def _die_one_by_one(lab: Lab) -> None:
    async with PlannerClient.open(lab.amqp_url) as planner:
        async with planner.watch() as events:
            deaths: dict[UUID, float] = {}
            watching = asyncio.create_task(_noticed(events, deaths))
            async with AsyncExitStack() as stack:
                for number in range(DEATHS):
                    agent_id = await _die(lab, stack, number, SHORT_INTERVAL_SECONDS, closes=False)
                    deaths[agent_id] = time.monotonic()
                    await asyncio.sleep(0.5)
                _print_deaths("silence: offline", await watching, SHORT_INTERVAL_SECONDS)
        async with AsyncExitStack() as stack:
            waits = []
            for number in range(DEATHS):
                await _die(lab, stack, number, LONG_INTERVAL_SECONDS, closes=True)
                waits.append(asyncio.create_task(_not_offered(planner, number)))
                await asyncio.sleep(0.5)
            seconds = await asyncio.gather(*waits)
            _print_deaths("a cut connection: not offered", seconds, LONG_INTERVAL_SECONDS)


def _print_deaths(what: str, seconds: Sequence[float], interval_seconds: float) -> None:
    noticed, lease = sorted(seconds), lease_for(interval_seconds)
    p50, p99 = noticed[len(noticed) // 2], noticed[int(len(noticed) * 0.99)]
    print(
        f"death by {what} after {p50:.2f} s (p50), {p99:.2f} s (p99); lease {lease:g} s,"
        f" {len(noticed)} deaths",
        flush=True,
    )


async def _not_offered(planner: PlannerClient, number: int) -> float:
    """Return after how many seconds a dying agent is offered no more."""
    died = time.monotonic()
    query = CapacityQuery(pool_name=f"dying-{number}")

    async def is_gone() -> bool:
        return not (await planner.find(query)).agents

    await until(is_gone, f"agent {number} is not offered")
    return time.monotonic() - died


async def _noticed(events: AsyncIterator[Event], deaths: dict[UUID, float]) -> list[float]:
    """Return how many seconds after each death its event came."""
    seconds: list[float] = []
    async for event in events:
        if isinstance(event, AgentEvent) and event.status == "offline" and event.agent_id in deaths:
            seconds.append(time.monotonic() - deaths[event.agent_id])
            if len(seconds) == DEATHS:
                break
    return seconds


async def _die(
    lab: Lab, stack: AsyncExitStack, number: int, interval_seconds: float, *, closes: bool
) -> UUID:
    """Be an agent for one heartbeat, and end without a farewell."""
    proxy = Proxy.to(lab.amqp_url)
    opened_proxy = proxy.running()
    await opened_proxy.__aenter__()
    agent = BaseAgent(
        proxy.url(lab.amqp_url),
        pool_name=f"dying-{number}",
        interval_seconds=interval_seconds,
        resources=FixedResources(),
    )
    await agent.__aenter__()
    await agent.send_heartbeat()
    if closes:
        agent._supervised._task.cancel()  # or it would dial again, through a port that is closed
        await opened_proxy.__aexit__(None, None, None)
    else:
        proxy.swallows = True
        stack.push_async_exit(opened_proxy)
    agent._task.cancel()
    stack.callback(agent._supervised._task.cancel)
    return agent.identity.agent_id


if __name__ == "__main__":
    logging.disable()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1_000)
    parser.add_argument("--restarts", type=int, default=20)
    # A thousand agents share this process; those of a fleet have one each. The collector's pauses
    # would hold up all of them at once.
    gc.disable()
    parser.add_argument("--components", nargs="*", choices=COMPONENTS, default=COMPONENTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chiffon-restarts-") as made:
        os.chmod(made, 0o755)  # the database's user must get in
        asyncio.run(measure(Path(made), arguments.agents, arguments.restarts, arguments.components))
