"""An orchestrator that is killed between receipt and commit: nothing lost, nothing doubled."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg

from chiffon.contract.codec import encode, routing_key
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.system import consumers
from tests.fixtures.waiting import until


@asynccontextmanager
async def process(
    amqp_url: str, database_url: str, log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run an orchestrator as a process; entered when the broker sees its responder."""
    before = await consumers(amqp_url, "chiffon.capacity")
    with log.open("ab") as output:
        running = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "chiffon",
            "orchestrator",
            "run",
            env={
                **os.environ,
                "CHIFFON_AMQP_URL": amqp_url,
                "CHIFFON_DATABASE_URL": database_url,
            },
            stdout=output,
            stderr=output,
        )

    async def has_started() -> bool:
        assert running.returncode is None, log.read_text()  # noqa: ASYNC240
        return await consumers(amqp_url, "chiffon.capacity") > before

    try:
        await until(has_started, "a consumer on chiffon.capacity")
        yield running
    finally:
        if running.returncode is None:
            running.terminate()
            await running.wait()


async def test_kill_9_between_receipt_and_commit_loses_and_doubles_nothing(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    database: "asyncpg.Connection[Any]",
    tmp_path: Path,
) -> None:
    """Two orchestrators start, as processes."""
    known = uuid4()
    sent = [update(known, sequence=5, interval_seconds=60.0)]
    sent += [update(interval_seconds=60.0) for _ in range(49)]
    log = tmp_path / "orchestrator.log"
    async with (
        process(amqp_url, database_url, log) as first,
        plain.channel(amqp_url) as to,
    ):
        lock = database.transaction()
        await lock.start()
        await database.execute("LOCK TABLE agent_registry IN SHARE ROW EXCLUSIVE MODE")
        for one in sent:
            await plain.publish(
                to, "chiffon.heartbeats", routing_key(one), encode(one), "status_update.v1"
            )

        async def waits_for_the_lock() -> bool:
            return bool(
                await database.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND datname = current_database() AND query LIKE '%INSERT INTO agent_reg%'"
                )
            )

        await until(waits_for_the_lock, "a batch in the middle of its commit")
        first.send_signal(signal.SIGKILL)
        assert await first.wait() == -signal.SIGKILL
        assert await registry.agents.list() == [], "nothing was committed before the kill"

        async def is_back() -> bool:
            return (await plain.depth(amqp_url, "chiffon.ingest"))[0] == len(sent)

        await until(is_back, "every heartbeat back in the queue")
        await lock.rollback()

    async with process(amqp_url, database_url, log) as second:

        async def all_there() -> bool:
            return len(await registry.agents.list()) == len(sent)

        await until(all_there, "every agent in the registry")
        before = await registry.agents.list()
        async with plain.channel(amqp_url) as to:
            for one in [update(known, sequence=4, status="busy"), *sent]:
                await plain.publish(
                    to, "chiffon.heartbeats", routing_key(one), encode(one), "status_update.v1"
                )
            marker = update()
            await plain.publish(
                to, "chiffon.heartbeats", routing_key(marker), encode(marker), "status_update.v1"
            )

        async def marked() -> bool:
            return await registry.agents.show(marker.agent_id) is not None

        await until(marked, "the last heartbeat in the registry")
        after = {row.agent_id: row for row in await registry.agents.list()}
        for row in before:
            assert after[row.agent_id].last_heartbeat_at == row.last_heartbeat_at
            assert after[row.agent_id].sequence == row.sequence
            assert after[row.agent_id].status == "online"
        second.send_signal(signal.SIGTERM)
        assert await second.wait() == 0

    assert (await plain.depth(amqp_url, "chiffon.ingest"))[0] == 0
    assert "Traceback" not in log.read_text()
