"""The database is killed, frozen, locked, full, and its clock jumps."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from chiffon.embedded.postgres import asyncpg_url
from tests.faults.conftest import Survives
from tests.faults.lab import Lab

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

END_CONNECTIONS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'chiffon'
"""
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


async def test_its_connections_are_ended(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        connection = await asyncpg.connect(asyncpg_url(lab.database_url))
        for _ in range(5):
            assert await connection.fetchval(END_CONNECTIONS) > 0
            await asyncio.sleep(0.3)
        await connection.close()

    await survives(lab, "database connections ended, five times", fault)


async def test_it_takes_no_connections(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        url, _, name = asyncpg_url(lab.database_url).rpartition("/")
        connection = await asyncpg.connect(f"{url}/postgres")
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        assert await connection.fetchval(END_CONNECTIONS) > 0
        await asyncio.sleep(8)
        with pytest.raises(asyncpg.PostgresError, match="not currently accepting connections"):
            await asyncpg.connect(asyncpg_url(lab.database_url))
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        await connection.close()

    await survives(lab, "database takes no connections for 8 s", fault)


@pytest.mark.essential
async def test_it_is_killed_and_started_again(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        lab.database.kill()
        await asyncio.sleep(8)
        lab.database.start()

    await survives(lab, "database killed (-9), away for 8 s", fault)


async def test_it_is_frozen(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        lab.database.freeze()
        await asyncio.sleep(8)
        assert lab.database.is_frozen
        lab.database.thaw()

    await survives(lab, "database frozen for 8 s", fault)


async def test_the_registry_is_locked(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        connection = await asyncpg.connect(asyncpg_url(lab.database_url))
        async with connection.transaction():
            await connection.execute("LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(9)
            waiting = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            assert waiting > 0
        await connection.close()

    await survives(lab, "registry locked for 9 s", fault)


@pytest.mark.skipif(not FAKETIME, reason="there is no libfaketime: apt-get install libfaketime")
async def test_its_clock_jumps(lab: Lab, survives: Survives) -> None:
    """An hour ahead, and back: nobody is offline, and nothing is stuck for an hour."""

    async def clock() -> float:
        connection = await asyncpg.connect(asyncpg_url(lab.database_url))
        try:
            found: float = await connection.fetchval(
                "SELECT extract(epoch FROM clock_timestamp())::float8"
            )
        finally:
            await connection.close()
        return found

    async def restarted(**environment: str) -> float:
        before = await clock()
        lab.database.kill()
        lab.database.start(**environment)
        while True:
            try:
                return await clock() - before
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.1)

    async def ahead() -> None:
        jumped = await restarted(
            LD_PRELOAD=str(FAKETIME[0]), FAKETIME="+1h", FAKETIME_DONT_FAKE_MONOTONIC="1"
        )
        assert jumped > 3_500

    async def back() -> None:
        assert await restarted() < -3_500

    await survives(lab, "database's clock jumps an hour ahead", ahead)
    await survives(lab, "database's clock jumps an hour back", back)
