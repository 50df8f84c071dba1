"""What PgBouncer costs: the same statements straight, and through it in both of its modes.

    python -m benchmarks.pooler

A private PostgreSQL, as durable as in production. One caller at a time, so what differs is the
round trips. Through a pooler that gives each transaction to any server, chiffon begins a
transaction, sets what its statements rely on, and prepares nothing: five round trips for one.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import asyncpg

from benchmarks.filled import fill
from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityQuery, ReservationRelease
from chiffon.embedded import postgres
from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.heartbeats import update
from tests.fixtures.pgbouncer import pooling
from tests.fixtures.rooms import request


async def milliseconds(work: Callable[[], Awaitable[object]], rounds: int) -> float:
    """Return the median time of one round."""
    for _ in range(5):
        await work()
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return 1_000 * statistics.median(took)


async def measure(url: str, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each kind of work."""
    updates = [update(interval_seconds=600.0) for _ in range(500)]
    updates.sort(key=lambda one: one.agent_id)
    async with Registry.open(url) as registry:
        capacity, reservations = OrchestratorService(registry), ReservationService(registry)

        async def record() -> None:
            for position, one in enumerate(updates):
                updates[position] = one.model_copy(update={"sequence": one.sequence + 1})
            await registry.heartbeats.record([Received(one, time.monotonic()) for one in updates])

        async def reserve_and_release() -> None:
            made = await reservations.reserve(request(cpu_cores=1, agent_type=None))
            released = ReservationRelease(reservation_id=made.reservation_id, fence=made.fence)
            await reservations.release(released)

        async def find() -> None:
            await capacity.find(CapacityQuery(agent_type=None, limit=10))

        return {
            "record 500": await milliseconds(record, rounds),
            "find 10": await milliseconds(find, rounds),
            "show": await milliseconds(lambda: registry.agents.show(uuid4()), rounds),
            "reserve, release": await milliseconds(reserve_and_release, rounds),
        }


async def run(rounds: int) -> None:
    """Measure each way to the database, and print each beside the straight one."""
    async with AsyncExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="chiffon-benchmark-"))
        os.chmod(name, 0o755)  # the database's user must get in
        server = await stack.enter_async_context(postgres.run(Path(name)))
        await migrations.upgrade(server.url)
        connection = await asyncpg.connect(asyncpg_url(server.url))
        await fill(connection, 10_000)
        await connection.close()
        session = await stack.enter_async_context(pooling(server.url, "session"))
        transaction = await stack.enter_async_context(pooling(server.url, "transaction"))
        ways = {
            "straight": server.url,
            "session mode, prepared_statements=on": f"{session}?prepared_statements=on",
            "session mode, found out": session,
            "transaction mode, found out": transaction,
        }
        await measure(server.url, rounds)  # whoever comes first finds nothing in memory
        straight: dict[str, float] = {}
        for way, url in ways.items():
            took = await measure(url, rounds)
            straight = straight or took
            cells = [
                f"{what} {found:.2f} ms ({found / straight[what]:.1f}x)"
                for what, found in took.items()
            ]
            print(f"{way:38}{'  '.join(cells)}", flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
