"""Thousands of agents with a connection each: memory, and a broker that is killed under them.

    python -m benchmarks.connections --agents 2000

A private RabbitMQ and PostgreSQL, one orchestrator, and agents in four processes that speak every
5 s, each over a connection of its own. The broker is killed (-9) and
started again; what is counted is when the registry has heard each agent after that, and who was
marked offline.
"""

import argparse
import asyncio
import sys
import time
from bisect import bisect
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.stage import Stage, is_open, process, staged, where
from tests.faults.server import Server
from tests.fixtures.servers import Management
from tests.fixtures.waiting import until

PROCESSES = 4
BACK_SECONDS = 300.0
QUIET = {"CHIFFON_LOG_LEVEL": "ERROR"}
"""That the broker is away they would say for as long as it is."""

HEARD = """
SELECT extract(epoch FROM clock_timestamp() - last_heartbeat_at)::float8
  FROM agent_registry WHERE pool_name = 'swarm' AND status = 'online'
"""
BACK = """
SELECT agent_id, extract(epoch FROM clock_timestamp() - last_heartbeat_at)::float8 AS age
  FROM agent_registry
 WHERE pool_name = 'swarm'
   AND last_heartbeat_at > clock_timestamp() - $1::float8 * interval '1 second'
"""
MARKED = "SELECT count(*) FROM agent_registry WHERE pool_name = 'swarm' AND status = 'offline'"


async def measure(stage: Stage, agents: int) -> None:
    """Let so many agents speak, kill the broker, and print what came of it."""
    node = stage.node
    assert node is not None
    home = Path(node.environment["HOME"])
    broker = Server(stage.broker_pid, [str(node.program)], node.environment, home)
    with ExitStack() as stack:
        stack.callback(broker.end)
        orchestrator = stack.enter_context(
            process((sys.executable, "-m", "chiffon", "orchestrator", "run"), stage, **QUIET)
        )
        swarm = [sys.executable, "-m", "benchmarks.swarm", str(agents // PROCESSES)]
        began = time.monotonic()
        empty = memory(stage.broker_pid)
        for _ in range(PROCESSES):
            stack.enter_context(process(swarm, stage, SWARM_URL=stage.amqp_url))
        await until(lambda: heard(stage, agents, 60.0), f"{agents} agents in the registry", 300)
        first = time.monotonic() - began
        await asyncio.sleep(10)  # the broker's memory settles
        full = memory(broker.pid)
        sizes = [f"orchestrator {memory(orchestrator.pid) / 2**20:.0f} MiB"]
        broker.kill()
        killed = time.monotonic()
        broker.start()
        await until(lambda: is_open(stage.amqp_url), "the broker again", 120)
        opened = time.monotonic()
        # Nobody is heard while the broker is away; what it had delivered before is recorded by now.
        curve = await returns(stage, agents, killed + 1.0)
        dials = await until(lambda: dialled(stage), "the broker's list of connections", 60)
        async with stage.database() as database:
            marked = await database.fetchval(MARKED)
            await database.execute("TRUNCATE agent_registry CASCADE")
    print(
        f"\n{agents} agents, a connection each: all heard {first:.1f} s after the first was started"
    )
    print(
        f"memory: broker {empty / 2**20:.0f} MiB before, {full / 2**20:.0f} MiB with them "
        f"({(full - empty) / agents / 1024:.0f} KiB an agent), {', '.join(sizes)}"
    )
    away = opened - killed - 1.0
    half, most, every = (curve[int(len(curve) * share) - 1] - away for share in (0.5, 0.99, 1.0))
    print(
        f"broker killed, up again after {away + 1.0:.1f} s; heard again after that: half "
        f"{half:.1f} s, 99 % {most:.1f} s, all {every:.1f} s; marked offline: {marked}"
    )
    print(
        f"{len(dials)} connections at the broker since then, made within "
        f"{dials[-1] - dials[0]:.1f} s; busiest second {busiest(dials)}"
    )


async def heard(stage: Stage, agents: int, within: float) -> bool:
    """Return whether so many agents were heard within so many seconds."""
    async with stage.database() as database:
        ages = await database.fetch(HEARD)
    return sum(bool(row[0] < within) for row in ages) >= agents


async def returns(stage: Stage, agents: int, since: float) -> list[float]:
    """Return when each agent was heard for the first time since then: seconds after it, sorted."""
    back: dict[object, float] = {}
    async with stage.database() as database:
        while len(back) < agents:
            now = time.monotonic()
            if now - since > BACK_SECONDS:
                raise AssertionError(f"{agents - len(back)} agents are not back")
            for row in await database.fetch(BACK, now - since):
                back.setdefault(row["agent_id"], now - since - row["age"])
            await asyncio.sleep(0.5)
    return sorted(back.values())


async def dialled(stage: Stage) -> list[float]:
    """Return when each connection that the broker has was made, in seconds, the first first."""
    call = Management(stage.management_url).call
    connections = await asyncio.to_thread(call, "GET", "connections?columns=connected_at")
    return sorted(one["connected_at"] / 1_000 for one in connections if "connected_at" in one)


def busiest(dials: Sequence[float]) -> int:
    """Return the most connections that were made within one second."""
    return max(bisect(dials, start + 1) - place for place, start in enumerate(dials))


def memory(pid: int) -> int:
    """Return the bytes of memory that a process and its children have for themselves."""
    whole = psutil.Process(pid)
    return sum(one.memory_full_info().uss for one in (whole, *whole.children(recursive=True)))


async def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=2_000)
    agents = parser.parse_args().agents
    async with staged() as stage:
        print(where(stage))
        await measure(stage, agents)


if __name__ == "__main__":
    asyncio.run(main())
