"""How old a reading is when planners see it, and how fast a backlog is caught up.

    python -m benchmarks.age --heartbeats 2000 --agents 10000

While a fleet speaks, one more agent publishes a new reading, and a planner asks `find` until the
answer has it: that is the age. Beside it, in the same run: the same with nobody else speaking, and
how long one such question takes. Then the orchestrator is away while the queue fills, and comes
back.
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

from benchmarks.capacity import first_answer
from benchmarks.stage import Fleet, Stage, counted, percentiles, process, publish, staged, where
from chiffon import PlannerClient
from chiffon.amqp.publisher import Publisher, publish_heartbeat
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.messages import CapacityQuery
from chiffon.embedded.children import free_port
from tests.fixtures.heartbeats import update
from tests.fixtures.waiting import until

ORCHESTRATOR = (sys.executable, "-m", "chiffon", "orchestrator", "run")
POOL = "probe"
MOST_IN_QUEUE = 100_000
BATCH = "chiffon_ingest_batch_heartbeats"


async def ages(stage: Stage, probes: int) -> tuple[list[float], list[float]]:
    """Return how old each reading was when a planner saw it, and how long each question took."""
    seen: list[float] = []
    asked: list[float] = []
    query = CapacityQuery(pool_name=POOL, min_cpu_cores=0, limit=1)
    async with AsyncExitStack() as stack:
        planner = await stack.enter_async_context(PlannerClient.open(stage.amqp_url))
        link = await stack.enter_async_context(
            ReconnectingConnection(stage.amqp_url, name="benchmark probes")
        )
        publisher = Publisher(link)
        await first_answer(planner, query)
        agent_id = UUID(int=7, version=4)
        for sequence in range(1, probes + 1):
            reading = {"cpu_cores_available": sequence % 17, "cpu_cores_physical": 17}
            one = update(
                agent_id,
                pool_name=POOL,
                incarnation=time.time_ns() // 1_000_000,
                sequence=sequence,
                resources=reading,
            )
            began = time.monotonic()
            await publish_heartbeat(publisher, one)
            while True:
                asks = time.monotonic()
                answer = await planner.find(query, timeout=30)
                now = time.monotonic()
                asked.append(now - asks)
                if answer.agents and answer.agents[0].cpu_cores_available == sequence % 17:
                    seen.append(now - began)
                    break
            await asyncio.sleep(0.02)
    return seen, asked


def show(label: str, seconds: list[float]) -> None:
    """Print percentiles."""
    p50, p99, p999 = (one * 1e3 for one in percentiles(seconds))
    print(f"  {label:<40}p50 {p50:>8.1f}   p99 {p99:>8.1f}   p99.9 {p999:>8.1f} ms", flush=True)


class Batches:
    """How many heartbeats an orchestrator commits at once, by its own metrics."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._before = 0.0, 0.0

    def show(self) -> None:
        """Print the mean since the last time."""
        sums = counted(self._port, f"{BATCH}_sum"), counted(self._port, f"{BATCH}_count")
        heartbeats, batches = (now - then for now, then in zip(sums, self._before, strict=True))
        self._before = sums
        print(f"  {'heartbeats in a batch':<40}mean {heartbeats / batches:>7.1f}", flush=True)


async def catch_up(stage: Stage, fleet: Fleet, alive: int) -> None:
    """Fill the queue while the orchestrator is away, and let it come back.

    Of as many heartbeats as the queue holds, only so many have not outlived their lease.
    """
    rounds = MOST_IN_QUEUE // len(fleet.agent_ids)
    async with stage.database() as database:
        await stage.purge()
        await fleet.add_rows(database)
        heartbeats = fleet.heartbeats()
        await publish(stage.amqp_url, heartbeats, MOST_IN_QUEUE - alive, expiration_ms=1)
        await publish(stage.amqp_url, heartbeats, alive)

        async def is_caught_up() -> bool:
            least = await database.fetchval("SELECT min(sequence) FROM agent_registry")
            return bool(least == rounds)

        with process(ORCHESTRATOR, stage):
            began = time.monotonic()
            await until(is_caught_up, "every agent's newest heartbeat", 120)
            seconds = time.monotonic() - began
    print(
        f"  {MOST_IN_QUEUE} heartbeats of {len(fleet.agent_ids)} agents, of which {alive} have not"
        f" outlived their lease: caught up {seconds:.1f} s after the start of the process",
        flush=True,
    )


async def run(agents: int, heartbeats: int, probes: int) -> None:
    """Measure ages alone and under load, then the backlog."""
    fleet = Fleet(agents)
    async with staged() as stage:
        print(f"{where(stage)}; {agents} agents", flush=True)
        async with stage.database() as database:
            await fleet.add_rows(database)
        listed = Path(stage.folder) / "speakers"
        ids = (str(one) for one in fleet.agent_ids)
        listed.write_text(json.dumps([(*one, False) for one in zip(ids, fleet.pools, strict=True)]))
        port = free_port()
        batches = Batches(port)
        with process(ORCHESTRATOR, stage, CHIFFON_METRICS_PORT=str(port)):
            seen, asked = await ages(stage, probes)
            show("published to seen, nobody else", seen)
            show("  one question", asked)
            await asyncio.to_thread(batches.show)
            argv = (
                *(sys.executable, "-m", "benchmarks.capacity", "--publish", str(listed)),
                *("--heartbeats", str(heartbeats)),
            )
            with process(argv, stage):
                await _speaking(stage, heartbeats)
                seen, asked = await ages(stage, probes)
            show(f"published to seen, {heartbeats} heartbeats/s", seen)
            show("  one question", asked)
            await asyncio.to_thread(batches.show)
        for alive in (MOST_IN_QUEUE, 3 * agents):
            await catch_up(stage, fleet, alive)


async def _speaking(stage: Stage, heartbeats: int) -> None:
    """Wait until the fleet speaks as fast as it should, and say how fast it is."""
    async with stage.database() as database:

        async def is_fast() -> float:
            first = await database.fetchval("SELECT sum(sequence)::bigint FROM agent_registry")
            await asyncio.sleep(2)
            now = await database.fetchval("SELECT sum(sequence)::bigint FROM agent_registry")
            per_second = (now - first) / 2
            return per_second if per_second > 0.9 * heartbeats else 0.0

        print(f"  committed: {await until(is_fast, 'that rate', 60):.0f} heartbeats/s", flush=True)


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--heartbeats", type=int, default=2_000)
    parser.add_argument("--probes", type=int, default=300)
    given = parser.parse_args()
    asyncio.run(run(given.agents, given.heartbeats, given.probes))


if __name__ == "__main__":
    main()
