"""Heartbeats committed a second by several orchestrators on several shards, on one node and three.

    python -m benchmarks.shards

Private brokers and a private PostgreSQL, all durable, all on the same cores: what shards gain where
each node and each orchestrator has cores of its own cannot be seen here, what they cost can.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import aio_pika
import psutil

from benchmarks.ingest import COMMITTED, LIMIT_SECONDS, WARM_SHARE
from benchmarks.stage import Fleet, Stage, cpu_seconds, process, publish, staged, where
from chiffon import migrations
from chiffon.provisioning import ensure
from chiffon.resharding import retire
from chiffon.session import Session, dial_any
from chiffon.topology import Topology
from tests.faults import cluster
from tests.fixtures.waiting import until

LAYOUTS = ((1, 1), (1, 2), (2, 2), (2, 4))
"""Shards, and orchestrators."""

ORCHESTRATOR = (sys.executable, "-m", "chiffon", "orchestrator", "run")


async def measure(
    stage: Stage, brokers: Sequence[int], fleet: Fleet, layout: tuple[int, int], count: int
) -> dict[str, float]:
    """Fill the queues, start orchestrators, and count what they commit.

    Returns:
        Heartbeats a second, and µs of CPU for each: of orchestrators, brokers and the database.
    """
    shards, orchestrators = layout
    await reshard(stage, shards)
    async with stage.database() as database:
        await fleet.add_rows(database)
        await publish(stage.amqp_url, fleet.heartbeats(), count)
        await database.execute("CHECKPOINT")
        with ExitStack() as stack:
            own = [
                stack.enter_context(
                    process(
                        ORCHESTRATOR,
                        stage,
                        CHIFFON_INGEST_SHARDS=str(shards),
                        CHIFFON_INGEST_SHARD=str(number % shards + 1),
                    )
                )
                for number in range(orchestrators)
            ]
            all_of = {
                "orchestrators": own,
                "brokers": [psutil.Process(pid) for pid in brokers],
                "database": [psutil.Process(stage.database_pid)],
            }

            def cpu() -> dict[str, float]:
                return {name: sum(map(cpu_seconds, them)) for name, them in all_of.items()}

            async def committed() -> int:
                return int(await database.fetchval(COMMITTED))

            async def warm() -> bool:
                return await committed() >= count * WARM_SHARE

            await until(warm, "the first commits", 60)
            first, began, before = await committed(), time.monotonic(), cpu()
            while True:
                await asyncio.sleep(0.25)
                done, now, after = await committed(), time.monotonic(), cpu()
                if done >= count * 0.9 or now - began > LIMIT_SECONDS:
                    break
    return {
        "rate": (done - first) / (now - began),
        **{name: (after[name] - before[name]) / (done - first) * 1e6 for name in all_of},
    }


async def reshard(stage: Stage, shards: int) -> None:
    """Leave queues for so many shards, empty, and none of what was there before."""

    async def dial() -> Session:
        return await dial_any(stage.amqp_url, "benchmark reshards")

    wanted = Topology.of(shards)
    await ensure(dial, wanted)
    for other in {one for one, _ in LAYOUTS} - {shards}:
        old = Topology.of(other)
        for queue in old.ingest:
            if await is_there(stage, queue):
                await stage.purge(queue)
        await retire(dial, old, wanted)
    for queue in wanted.ingest:
        await stage.purge(queue)


async def is_there(stage: Stage, queue: str) -> bool:
    """Return whether there is such a queue."""
    try:
        await stage.depth(queue)
    except aio_pika.exceptions.ChannelNotFoundEntity:
        return False
    return True


@asynccontextmanager
async def clustered() -> AsyncIterator[tuple[Stage, list[int]]]:
    """Run three nodes and a database."""
    with tempfile.TemporaryDirectory(prefix="chiffon-benchmark-") as name:
        os.chmod(name, 0o755)  # the database's user must get in
        async with cluster.servers(Path(name)) as lab:
            await migrations.upgrade(lab.database_url)
            pids = [broker.pid for broker in lab.brokers]
            one = lab.nodes[0].url + "/chiffon"
            yield Stage(one, lab.database_url, "", pids[0], lab.database.pid, name, None), pids


async def compare(stage: Stage, brokers: Sequence[int], agents: int, scale: float) -> None:
    """Measure every layout, and print a table."""
    print(f"{'shards':>6} {'orchestrators':>14} {'heartbeats/s':>13}   beside one   µs of CPU each")
    fleet, first = Fleet(agents), 0.0
    for layout in LAYOUTS:
        found = await measure(stage, brokers, fleet, layout, int(90_000 * scale))
        first = first or found["rate"]
        print(
            f"{layout[0]:>6} {layout[1]:>14} {found['rate']:>13,.0f} "
            f"{found['rate'] / first:>10.2f} x   orchestrators {found['orchestrators']:.0f}, "
            f"brokers {found['brokers']:.0f}, database {found['database']:.0f}",
            flush=True,
        )


async def main() -> None:
    """Measure on one node and on three."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--scale", type=float, default=1.0, help="Of the number of heartbeats.")
    given = parser.parse_args()
    async with staged() as stage:
        print(f"{where(stage)}\n\none node")
        await compare(stage, [stage.broker_pid], given.agents, given.scale)
    async with clustered() as (stage, brokers):
        print("\nthree nodes, each queue on all of them")
        await compare(stage, brokers, given.agents, given.scale)


if __name__ == "__main__":
    asyncio.run(main())
