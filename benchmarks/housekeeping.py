"""What heartbeats leave behind in the database: bloat, WAL, and how much of an update is in place.

    python -m benchmarks.housekeeping --agents 10000 --minutes 60

A private RabbitMQ and PostgreSQL, both durable, and agents that speak every 5 s, for as long as it
takes: autovacuum runs by the clock.
"""

import argparse
import asyncio
import sys
import time

import asyncpg

from benchmarks.stage import Fleet, Stage, counted, process, publish, staged, where
from chiffon.embedded.children import free_port

INTERVAL_SECONDS = 5.0
RECORDED = "chiffon_heartbeats_recorded_total"
LINES = 20

STATE = """
SELECT pg_table_size('agent_registry') / 2^20 AS table_mib,
       pg_indexes_size('agent_registry') / 2^20 AS index_mib,
       n_dead_tup AS dead, n_tup_upd AS updates, n_tup_hot_upd AS hot,
       autovacuum_count AS vacuums,
       pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8 AS wal
  FROM pg_stat_user_tables WHERE relname = 'agent_registry'
"""


async def measure(stage: Stage, agents: int, seconds: float) -> None:
    """Let agents speak for so long, and print what they left behind."""
    fleet, port = Fleet(agents), free_port()
    async with stage.database() as database:
        await fleet.add_rows(database)
        await database.execute("CHECKPOINT")

        async def look() -> asyncpg.Record:
            row = await database.fetchrow(STATE)
            assert row is not None
            return row

        first, messages, sent = await look(), fleet.heartbeats(), 0
        print(f"{'minute':>6} {'table':>9} {'indexes':>11} {'dead rows':>10} {'vacuums':>8}")
        print(line(0.0, first))
        argv = (sys.executable, "-m", "chiffon", "orchestrator", "run")
        with process(argv, stage, CHIFFON_METRICS_PORT=str(port)):
            began = shown = time.monotonic()
            while (now := time.monotonic()) - began < seconds:
                wanted = int((now - began) * agents / INTERVAL_SECONDS) - sent
                await publish(stage.amqp_url, messages, wanted)
                sent += wanted
                if now - shown >= seconds / LINES:
                    shown += seconds / LINES
                    print(line((now - began) / 60, await look()), flush=True)
                await asyncio.sleep(0.5)
            await asyncio.sleep(2)  # statistics are sent once a second
            last, recorded = await look(), await asyncio.to_thread(counted, port, RECORDED)
    updates, wal = last["updates"] - first["updates"], last["wal"] - first["wal"]
    print(
        f"{recorded:,.0f} of {sent:,} heartbeats recorded, {recorded / seconds:,.0f}/s; "
        f"WAL {wal / recorded:,.0f} bytes each, {updates / recorded:.2f} updates each, "
        f"{(last['hot'] - first['hot']) / updates:.1%} of them in place (HOT)"
    )


def line(minute: float, row: asyncpg.Record) -> str:
    """Return a line of the table."""
    return (
        f"{minute:>6.1f} {row['table_mib']:>5.0f} MiB {row['index_mib']:>7.0f} MiB "
        f"{row['dead']:>10,} {row['vacuums']:>8}"
    )


async def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    async with staged() as stage:
        print(where(stage))
        await measure(stage, given.agents, given.minutes * 60)


if __name__ == "__main__":
    asyncio.run(main())
