"""How long a sweep takes, by how many agents there are and how many of them are silent.

    python -m benchmarks.sweep --agents 100000 1000000

A private PostgreSQL, as durable as in production, without a broker. Beside each sweep stands one
look at every row (a count), which is what a sweep without an index would at least cost, and how
long the heartbeats of one agent took that were recorded meanwhile: what a sweep locks.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg

from benchmarks.filled import fill
from chiffon.embedded import postgres
from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.heartbeats import update
from tests.fixtures.sweeping import sweep

SILENT = "UPDATE agent_registry SET last_heartbeat_at = now() - interval '1 day' WHERE "
LOOK = "SELECT count(*) FROM agent_registry WHERE last_heartbeat_at < now() - interval '1 minute'"
CANARY = "UPDATE ingest_path SET fresh_at = now(), fresh_since = now() - interval '3 hours'"


class Sweeps:
    """Runs sweeps and prints how long they took."""

    def __init__(self, database: "asyncpg.Connection[asyncpg.Record]", registry: Registry) -> None:
        self._database = database
        self._registry = registry

    async def run(self, label: str, count: int, closed: Sequence[UUID] = ()) -> None:
        """Sweep so often; the first one has to mark whoever is silent."""
        took: list[float] = []
        recorded: list[float] = []
        marked = frozen = 0
        speaking = asyncio.create_task(self._speak(recorded))
        for _ in range(count):
            await self._database.execute(CANARY)
            began = time.monotonic()
            if closed:
                await self._registry.sweep.hide_disconnected(closed, [2.0] * len(closed))
            swept = await sweep(self._registry)
            took.append(time.monotonic() - began)
            marked, frozen = marked + len(swept.marked), frozen + len(swept.began)
        speaking.cancel()
        await asyncio.wait([speaking])
        began = time.monotonic()
        await self._database.fetchval(LOOK)
        look = time.monotonic() - began
        best = min(took[1:] or took)
        print(
            f"  {label:<34}first {took[0] * 1e3:>9.1f} ms, then {best * 1e3:>9.1f} ms,"
            f" {best / look:>7.2f} x one look at every row ({look * 1e3:.0f} ms);"
            f" marked {marked}, pools held {frozen};"
            f" a heartbeat meanwhile {statistics.median(recorded) * 1e3:.1f} ms,"
            f" at most {max(recorded) * 1e3:.0f} ms",
            flush=True,
        )

    async def _speak(self, took: list[float]) -> None:
        """Be one agent that says something new all the time."""
        agent_id = uuid4()
        for sequence in itertools.count(1):
            began = time.monotonic()
            await self._registry.heartbeats.record(
                [Received(update(agent_id, sequence=sequence), began)]
            )
            took.append(time.monotonic() - began)


async def measure(agents: int, *, with_outages: bool) -> None:
    """Fill a registry, and sweep it in each state."""
    with tempfile.TemporaryDirectory(prefix="chiffon-benchmark-") as name:
        os.chmod(name, 0o755)  # the database's user must get in
        async with postgres.run(Path(name)) as server:
            await migrations.upgrade(server.url)
            database = await asyncpg.connect(asyncpg_url(server.url), command_timeout=600)
            await fill(database, agents)
            await database.execute("UPDATE agent_registry SET lease_seconds = 900")
            await database.execute("VACUUM ANALYZE agent_registry")
            print(f"{agents} agents:", flush=True)
            async with Registry.open(server.url) as registry:
                few = max(agents // 1_000, 3)
                await _sweep_all(database, Sweeps(database, registry), few, with_outages)
            await database.close()


async def _sweep_all(
    database: "asyncpg.Connection[asyncpg.Record]", sweeps: Sweeps, few: int, with_outages: bool
) -> None:
    await sweeps.run("nobody silent", 10)
    rows = await database.fetch("SELECT agent_id FROM agent_registry LIMIT $1", few)
    await sweeps.run(f"{few} connections closed", 3, [row["agent_id"] for row in rows])
    some = "agent_id IN (SELECT agent_id FROM agent_registry WHERE pool_name = $1 LIMIT $2)"
    await database.execute(SILENT + some, "pool-3", few)
    await sweeps.run(f"{few} of one pool silent", 3)
    if with_outages:
        await database.execute(SILENT + "pool_name = $1", "pool-4")
        await sweeps.run("a twentieth of them silent: held", 5)
        await database.execute(SILENT + "random() < 0.75 AND status = 'online'")
        await sweeps.run("three quarters silent: held", 3)


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--outages", action="store_true", help="most of the fleet silent as well")
    given = parser.parse_args()
    for agents in given.agents:
        asyncio.run(measure(agents, with_outages=given.outages))


if __name__ == "__main__":
    main()
