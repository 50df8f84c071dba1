"""Pool to a real PostgreSQL: kept, shared, given back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import asyncpg
import pytest

from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import RegistryUnavailable, RowRefused
from chiffon.registry import pool as pool_module
from chiffon.registry.pool import Pool
from chiffon.registry.session import Sessions
from tests.fixtures.waiting import until

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

OURS = """
SELECT count(*) FROM pg_stat_activity
 WHERE application_name = 'chiffon' AND datname = current_database()
"""


def are_open(database: Database, number: int) -> Callable[[], Awaitable[bool]]:
    async def condition() -> bool:
        return bool(await database.fetchval(OURS) == number)

    return condition


async def is_asleep(database: Database) -> bool:
    """Tell whether a statement sleeps in the server."""
    return bool(
        await database.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
            " AND datname = current_database()"
        )
    )


async def ask(connections: Pool, statement: str = "SELECT pg_backend_pid()") -> int:
    async with connections.one() as one:
        return int(await one.fetchval(statement))


async def test_a_connection_is_used_again(database_url: str) -> None:
    async with Pool.open(database_url, 3) as connections:
        assert len({await ask(connections) for _ in range(5)}) == 1


async def test_two_tasks_never_share_one(database_url: str) -> None:
    async with Pool.open(database_url, 2) as connections:
        async with connections.one() as first, connections.one() as second:
            assert first.get_server_pid() != second.get_server_pid()
        answers = await asyncio.gather(*(ask(connections) for _ in range(20)))
        assert len(set(answers)) <= 2


async def test_one_that_the_server_ended_is_not_used_again(
    database_url: str, database: Database
) -> None:
    async with Pool.open(database_url, 1) as connections:
        async with connections.one() as one:
            backend = one.get_server_pid()
        await database.execute("SELECT pg_terminate_backend($1)", backend)
        await until(are_open(database, 0), "the server has ended it")

        async def another() -> int | None:
            try:
                return await ask(connections)
            except RegistryUnavailable:  # it broke under this question
                return None

        assert await until(another, "another one answers") != backend


async def test_one_whose_statement_was_cancelled_is_used_when_that_has_ended(
    database_url: str, database: Database
) -> None:
    async with Pool.open(database_url, 1) as connections:
        asked = asyncio.create_task(ask(connections, "SELECT 1 FROM pg_sleep(600)"))

        await until(lambda: is_asleep(database), "the statement runs")
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await ask(connections, "SELECT 7") == 7
        assert not await is_asleep(database)


async def test_one_whose_statement_failed_is_used_again(database_url: str) -> None:
    async with Pool.open(database_url, 1) as connections:
        backend = await ask(connections)
        with pytest.raises(RowRefused, match="division by zero"):
            await ask(connections, "SELECT 1 / 0")
        assert await ask(connections) == backend


async def test_who_finds_all_in_use_is_told_so(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Pool.open(database_url, 1) as connections:
        async with connections.one():
            with monkeypatch.context() as impatient:
                impatient.setattr(pool_module, "ANSWER_SECONDS", 0.05)
                with pytest.raises(RegistryUnavailable, match="did not answer"):
                    await ask(connections)
        assert await ask(connections, "SELECT 7") == 7


async def test_what_nobody_has_used_for_long_is_the_pools_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncpg.create_pool(asyncpg_url(database_url), min_size=0, max_size=2) as pool:
        connections = Pool(pool, 2, Sessions(database_url))
        async with connections.one(), connections.one():
            pass
        assert pool.get_idle_size() == 0
        monkeypatch.setattr(pool_module, "KEPT_SECONDS", 0.0)
        backend = await ask(connections)
        assert pool.get_idle_size() == 1
        assert await ask(connections) == backend
        await connections.put_back()
        assert pool.get_idle_size() == 2


async def test_at_the_end_all_are_closed_also_those_in_use(
    database_url: str, database: Database
) -> None:
    async with Pool.open(database_url, 2) as connections:
        await ask(connections)
        asked = asyncio.create_task(ask(connections, "SELECT 7 FROM pg_sleep(0.5)"))
        await until(lambda: is_asleep(database), "it is asked")
    assert await asked == 7
    await until(are_open(database, 0), "all are closed")
