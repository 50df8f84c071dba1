"""What a relay saves: heartbeats in arrays of 100 beside single ones, and the relay's own cost.

    python -m benchmarks.relay

A private RabbitMQ and PostgreSQL, both durable. First an orchestrator alone, the queue filled
before. Of 100,000 agents each heartbeat becomes a row; of 10,000 and 1,000 the newest of a batch
does, and the more is superseded, the more is left of what carrying and reading cost. Then a relay
between a publisher and the broker, beside the same publisher without one.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from itertools import islice
from urllib.request import urlopen

import psutil

from benchmarks.ingest import LIMIT_SECONDS
from benchmarks.stage import Fleet, Stage, cpu_seconds, is_open, process, publish, staged, where
from chiffon.embedded.children import free_port
from chiffon.topology import relay_key
from tests.fixtures.waiting import until

ARRAY = 100
MOST_IN_QUEUE = 95_000
PER_SECOND = 2_000.0
RECORDED = "chiffon_heartbeats_recorded_total"
DONE = (RECORDED, "chiffon_heartbeats_superseded_total", "chiffon_heartbeats_stale_total")


def arrays(messages: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield the same heartbeats, a hundred in a message."""
    while True:
        bodies = [body for _, body in islice(messages, ARRAY)]
        yield relay_key("pool", "benchmark"), b"[" + b",".join(bodies) + b"]"


async def drained(stage: Stage, agents: int, count: int, of_relay: bool) -> dict[str, float]:
    """Fill the queue, start an orchestrator, and see how fast it has dealt with everything.

    Returns:
        Heartbeats a second, the share that became rows, and µs of CPU for each, by process.
    """
    fleet = Fleet(agents)
    async with stage.database() as database:
        await fleet.add_rows(database)
        await stage.purge()
        messages = fleet.heartbeats()
        if of_relay:
            await publish(stage.amqp_url, arrays(messages), count // ARRAY)
        else:
            await publish(stage.amqp_url, messages, count)
        await database.execute("CHECKPOINT")
        port = free_port()
        argv = (sys.executable, "-m", "chiffon", "orchestrator", "run")
        with process(argv, stage, CHIFFON_METRICS_PORT=str(port)) as running:
            whole = {
                "orchestrator": running,
                "broker": psutil.Process(stage.broker_pid),
                "database": psutil.Process(stage.database_pid),
            }

            async def dealt_with() -> float:
                return await asyncio.to_thread(counted, port, *DONE)

            def cpu() -> dict[str, float]:
                return {name: cpu_seconds(one) for name, one in whole.items()}

            first = await until(dealt_with, "the first heartbeats")
            rows = await asyncio.to_thread(counted, port, RECORDED)
            began, before = time.monotonic(), cpu()

            async def is_done() -> bool:
                return await dealt_with() >= count or time.monotonic() - began > LIMIT_SECONDS

            await until(is_done, "all of them", LIMIT_SECONDS + 10)
            done, seconds, after = await dealt_with() - first, time.monotonic() - began, cpu()
            rows = await asyncio.to_thread(counted, port, RECORDED) - rows
    return {
        "rate": done / seconds,
        "rows": rows / done,
        **{name: (after[name] - before[name]) / done * 1e6 for name in whole},
    }


async def forwarded(stage: Stage, agents: int, seconds: float, through_relay: bool) -> list[float]:
    """Publish 2,000 heartbeats a second, through a relay or not, and see what it costs.

    Returns:
        µs of CPU a heartbeat: of relay, orchestrator, broker and database.
    """
    fleet, port = Fleet(agents), free_port()
    count = int(PER_SECOND * seconds)
    async with stage.database() as database:
        await fleet.add_rows(database)
    await stage.purge()
    relay = (sys.executable, "-m", "chiffon.relay")
    orchestrator = (sys.executable, "-m", "chiffon", "orchestrator", "run")
    with (
        process(orchestrator, stage) as recording,
        process(relay, stage, CHIFFON_RELAY_PORT=str(port)) as relaying,
    ):
        url = f"amqp://127.0.0.1:{port}/" if through_relay else stage.amqp_url
        await until(lambda: is_open(url), "somebody who listens")
        servers = (psutil.Process(pid) for pid in (stage.broker_pid, stage.database_pid))
        whole = relaying, recording, *servers
        await publish(url, fleet.heartbeats(), int(PER_SECOND), per_second=PER_SECOND)
        before = [cpu_seconds(one) for one in whole]
        await publish(url, fleet.heartbeats(), count, per_second=PER_SECOND)
        after = [cpu_seconds(one) for one in whole]
    return [(b - a) / count * 1e6 for a, b in zip(before, after, strict=True)]


def counted(port: int, *names: str) -> float:
    """Return what a process has counted so far, added up; 0 while it does not answer."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[-1]) for line in lines if line.split()[0] in names)


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="Of the number of heartbeats.")
    parser.add_argument("--agents", type=int, nargs="*", default=[100_000, 10_000, 1_000])
    given = parser.parse_args()
    scale = given.scale
    async with staged() as stage:
        print(where(stage))
        for agents in given.agents:
            count = int(MOST_IN_QUEUE * scale)
            single = await drained(stage, agents, count, False)
            # Ten times as many where most are superseded; rows that change cost more by the time.
            count = count if agents >= MOST_IN_QUEUE else 10 * count
            many = await drained(stage, agents, count // ARRAY * ARRAY, True)
            print(f"\n{agents:,} agents: µs of CPU each")
            print(f"{'':<22} heartbeats/s  became rows  orchestrator  broker  database")
            for name, one in (("single", single), (f"arrays of {ARRAY}", many)):
                print(
                    f"{name:<22} {one['rate']:>12,.0f} {one['rows']:>12.0%} "
                    f"{one['orchestrator']:>13.1f} "
                    f"{one['broker']:>7.1f} {one['database']:>9.1f}"
                )
            print(f"arrays beside single: {many['rate'] / single['rate']:.1f} x")
        print(f"\n{PER_SECOND:,.0f} heartbeats/s of 10,000 agents: µs of CPU each")
        print(f"{'':<35}    relay  orchestrator  broker  database")
        for name, through in (("straight to the broker", False), ("through a relay", True)):
            costs = await forwarded(stage, 10_000, 10 * scale, through)
            print(
                f"{name:<35} {costs[0]:>8.1f} {costs[1]:>13.1f} {costs[2]:>7.1f} {costs[3]:>9.1f}"
            )


if __name__ == "__main__":
    asyncio.run(main())
