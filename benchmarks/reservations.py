"""Reservations: a race for the last room, and how many a second at 10,000 agents.

    python -m benchmarks.reservations --rounds 1000 --agents 10000 --heartbeats 2000

Two orchestrators, a private RabbitMQ and PostgreSQL. First fifty planners race for one agent's
only room, round after round: one of them must get it, nobody twice, and everybody else a reason.
Then planners take room and give it back at once, alone and while the fleet speaks; beside it, in
the same run, the same planners ask ``find``.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg

from chiffon import PlannerClient
from chiffon.amqp.connection import dial_any
from chiffon.amqp.publisher import Properties
from chiffon.contract.messages import (
    STATUS_UPDATE,
    CapacityQuery,
    CapacityReserve,
    ReservationRelease,
)
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import CapacityRefused, InsufficientCapacity
from chiffon.registry.registry import Registry
from tests.faults.lab import Lab, opened
from tests.fixtures.rooms import broken, gpu, record, request, rig

PLANNERS = 50
CONNECTIONS = 5
SECONDS = 20.0

FILL = """
INSERT INTO agent_registry (agent_id, agent_type, pool_name, status, hostname, last_heartbeat_at,
                            lease_seconds, interval_seconds, incarnation, resource_metrics)
SELECT id, 'desktop', 'pool-' || n % 20, 'online', 'rig-' || n, now(), 1800, 600, 1, $2::jsonb
  FROM unnest($1::uuid[]) WITH ORDINALITY AS a (id, n)
"""
METRICS = {
    "cpu_cores_available": 32,
    "memory_available_gb": 200.0,
    "gpu_type": "nvidia",
    "gpu_vram_total_gb": 160.0,
    "gpu_vram_available_gb": 150.0,
    "gpu_vram_max_available_gb": 80.0,
    "gpus": [gpu(0, 80.0), gpu(1, 70.0)],
}


async def race(lab: Lab, planners: Sequence[PlannerClient], rounds: int) -> None:
    """Let all planners want the same room, and count who got it."""
    granted = refused = unexplained = twice = none = 0
    problems: list[str] = []
    database = await asyncpg.connect(asyncpg_url(lab.database_url))
    async with Registry.open(lab.database_url) as registry:
        for number in range(rounds):
            pool_name = f"race-{number % 4}"
            if number < 4:
                await record(
                    registry, rig(gpu(0, 24.0, 24.0), pool_name=pool_name, interval_seconds=600.0)
                )

            async def take(planner: PlannerClient, pool: str = pool_name) -> UUID | str:
                try:
                    made = await planner.reserve_once(
                        request(gpu_vram_gb=20.0, pool_name=pool), timeout=30.0
                    )
                except InsufficientCapacity as error:
                    return error.message
                return made.reservation_id

            outcomes = await asyncio.gather(*(take(planner) for planner in planners))
            winners = [one for one in outcomes if isinstance(one, UUID)]
            reasons = [one for one in outcomes if isinstance(one, str)]
            granted, refused = granted + len(winners), refused + len(reasons)
            twice, none = twice + max(len(winners) - 1, 0), none + (not winners)
            unexplained += sum("too little free VRAM" not in one for one in reasons)
            if number % 50 == 0:
                problems += await broken(database)
            for won in winners:
                await planners[0].release(ReservationRelease(reservation_id=won))
        problems += await broken(database)
    await database.close()
    print(f"{rounds} rounds, {len(planners)} planners, 2 responders, room for one:")
    print(f"  granted {granted}, refused {refused}")
    print(f"  double bookings {twice}, rounds without a winner {none}")
    print(f"  losers without a reason {unexplained}, other violations {len(problems)}", flush=True)
    if twice or none or unexplained or problems:
        raise SystemExit(f"this must never be: {problems}")


async def rate(what: str, planners: Sequence[PlannerClient], ask: "Ask") -> float:
    """Let all planners ask for a while; print and return how many a second."""
    seconds: list[float] = []
    stop = time.monotonic() + SECONDS

    async def one(planner: PlannerClient) -> None:
        while time.monotonic() < stop:
            seconds.extend(await ask(planner))

    began = time.monotonic()
    await asyncio.gather(*(one(planner) for planner in planners))
    per_second = len(seconds) / (time.monotonic() - began)
    seconds.sort()
    p50, p99 = statistics.median(seconds), seconds[int(len(seconds) * 0.99)]
    print(
        f"  {what:<34}{len(planners):>4} at once{per_second:>9.0f}/s"
        f"   p50 {p50 * 1e3:>7.1f} ms   p99 {p99 * 1e3:>7.1f} ms   p99/p50 {p99 / p50:>5.1f}",
        flush=True,
    )
    return per_second


Ask = Callable[[PlannerClient], Awaitable[list[float]]]


async def find(planner: PlannerClient) -> list[float]:
    """Ask who has room for what ``reserve`` takes."""
    began = time.monotonic()
    await planner.find(CapacityQuery(min_single_gpu_vram_gb=20, limit=1), timeout=30.0)
    return [time.monotonic() - began]


async def reserve(planner: PlannerClient) -> list[float]:
    """Take room, and give it back untimed."""
    wanted = CapacityReserve(
        holder="benchmark", idempotency_key=uuid4(), gpu_vram_gb=20.0, cpu_cores=2, memory_gb=8.0
    )
    began = time.monotonic()
    try:
        made = await planner.reserve_once(wanted, timeout=30.0)
    except CapacityRefused as error:
        raise AssertionError(f"there is room for all: {error}") from None
    took = time.monotonic() - began
    await planner.release(ReservationRelease(reservation_id=made.reservation_id), timeout=30.0)
    return [took]


async def publish(url: str, per_second: int) -> None:
    """Be the fleet: heartbeats of the agents whose ids come on standard input, for ever."""
    agent_ids = sys.stdin.read().split()
    connection = await dial_any(url, "benchmark publishes")
    channel = await connection.channel(confirms=False)
    resources = json.dumps(METRICS)
    properties = Properties(message_type=STATUS_UPDATE, content_type="application/json")
    began = time.monotonic()
    for number, agent_id in enumerate(cycle(agent_ids)):
        sequence = number // len(agent_ids) + 1
        body = (
            f'{{"agent_id": "{agent_id}", "pool_name": "pool", "hostname": "rig", "incarnation": 2,'
            f' "sequence": {sequence}, "sent_at": "2026-01-01T00:00:00Z",'
            f' "interval_seconds": 600.0, "resources": {resources}}}'
        )
        await channel.basic_publish(
            body.encode(),
            exchange="chiffon.heartbeats",
            routing_key=f"heartbeat.pool.desktop.{agent_id}",
            properties=properties,
        )
        ahead = number / per_second - (time.monotonic() - began)
        if ahead > 0.01:
            await asyncio.sleep(ahead)


async def committed(database: "asyncpg.Connection[asyncpg.Record]") -> int:
    """Return how many heartbeats the registry has seen, about."""
    return int(await database.fetchval("SELECT sum(sequence) FROM agent_registry"))


async def measure(folder: Path, rounds: int, agents: int, heartbeats: int) -> None:
    """Start everything, race, and print how many reservations a second there are."""
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(opened(folder, count=1, interval_seconds=5.0))
        clients = [
            await stack.enter_async_context(PlannerClient.open(lab.amqp_url))
            for _ in range(CONNECTIONS)
        ]
        planners = [clients[number % CONNECTIONS] for number in range(PLANNERS)]
        if rounds:
            await race(lab, planners, rounds)
        database = await asyncpg.connect(asyncpg_url(lab.database_url))
        stack.push_async_callback(database.close)
        ids = [uuid4() for _ in range(agents)]
        await database.execute(FILL, ids, json.dumps(METRICS))
        await database.execute("VACUUM ANALYZE agent_registry")
        print(f"{agents} agents, {SECONDS:g} s each:")
        for few in (planners[:1], planners):
            base = await rate("find, alone", few, find)
            print(
                f"{'':>38}reservations: {await rate('reserve, alone', few, reserve) / base:.2f} x"
            )
        fleet = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.reservations", "--publish", str(heartbeats)),
            stdin=asyncio.subprocess.PIPE,
            env={"CHIFFON_AMQP_URL": lab.amqp_url},
        )
        try:
            assert fleet.stdin is not None
            fleet.stdin.write("\n".join(str(one) for one in ids).encode())
            fleet.stdin.close()
            await asyncio.sleep(agents / heartbeats + 2)
            before, began = await committed(database), time.monotonic()
            for few in (planners[:1], planners):
                base = await rate(f"find, {heartbeats} heartbeats/s", few, find)
                made = await rate(f"reserve, {heartbeats} heartbeats/s", few, reserve)
                print(f"{'':>38}reservations: {made / base:.2f} x")
            seconds = time.monotonic() - began
            print(f"  heartbeats committed: {(await committed(database) - before) / seconds:.0f}/s")
        finally:
            fleet.kill()
            await fleet.wait()
        print(f"  violations at the end: {len(await broken(database))}")


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--heartbeats", type=int, default=2_000)
    parser.add_argument("--publish", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.publish:
        asyncio.run(publish(os.environ["CHIFFON_AMQP_URL"], given.publish))
        return
    with tempfile.TemporaryDirectory(prefix="chiffon-benchmark-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        asyncio.run(measure(folder, given.rounds, given.agents, given.heartbeats))


if __name__ == "__main__":
    main()
