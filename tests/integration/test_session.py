"""Sessions with PostgreSQL: what others set, a pooler between, several hosts."""

import asyncio
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import asyncpg
import pytest

from chiffon.capacity.reservations import ReservationService
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import InsufficientCapacity, RegistryRefused, RegistryUnavailable, TablesMissing
from chiffon.registry import migrations
from chiffon.registry.pool import Pool
from chiffon.registry.registry import Registry
from chiffon.registry.session import SETTINGS, Sessions
from tests.fixtures.heartbeats import update
from tests.fixtures.pgbouncer import needs_pgbouncer, pooling
from tests.fixtures.rooms import gpu, record, request, rig
from tests.fixtures.servers import Servers, execute

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

ODD = {
    "default_transaction_isolation": "repeatable read",
    "default_transaction_deferrable": "on",
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "bytea_output": "escape",
    "extra_float_digits": "-3",
    "transform_null_equals": "on",
    "statement_timeout": "2s",
    "idle_in_transaction_session_timeout": "2s",
    "lock_timeout": "7ms",
    "jit": "on",
    "plan_cache_mode": "force_custom_plan",
    "standard_conforming_strings": "off",
}


@pytest.fixture
async def odd_url(servers: Servers, database_url: str) -> str:
    """A database whose administrator likes everything otherwise than we do."""
    name = urlsplit(database_url).path[1:]
    for setting, value in ODD.items():
        await execute(servers.database_url, f"ALTER DATABASE {name} SET {setting} = '{value}'")
    return database_url


async def shown(url: str, names: list[str]) -> dict[str, str]:
    async with Pool.open(url, 1) as pool, pool.one() as connection:
        return {name: await connection.fetchval(f"SHOW {name}") for name in names}


async def test_what_a_database_sets_for_its_sessions_does_not_change_ours(odd_url: str) -> None:
    assert ODD.keys() >= SETTINGS.keys()
    connection = await asyncpg.connect(asyncpg_url(odd_url))
    theirs = {name: await connection.fetchval(f"SHOW {name}") for name in SETTINGS}
    await connection.close()

    ours = await shown(odd_url, list(SETTINGS))

    assert not [name for name in SETTINGS if theirs[name] == ours[name]]
    same = {"statement_timeout": "1min"}
    assert ours == {**SETTINGS, **same}


async def test_settings_of_the_url_count_for_each_session(database_url: str) -> None:
    url = f"{database_url}?options=-c%20search_path%3Dours,public%20-c%20work_mem%3D5MB"

    assert await shown(url, ["search_path", "work_mem", "TimeZone"]) == {
        "search_path": "ours,public",
        "work_mem": "5MB",
        "TimeZone": "UTC",
    }


async def test_planners_at_once_are_refused_for_want_of_room_only(
    odd_url: str, servers: Servers
) -> None:
    """Under "repeatable read" 11 of 20 were refused as they came at the same time."""
    async with Registry.open(odd_url) as registry:
        await record(registry, rig(gpu(0, 80.0)))
        service = ReservationService(registry)
        outcomes = await asyncio.gather(
            *(service.reserve(request(gpu_vram_gb=8.0)) for _ in range(20)), return_exceptions=True
        )

    granted = [one for one in outcomes if not isinstance(one, BaseException)]
    refused = [one for one in outcomes if isinstance(one, BaseException)]
    assert len(granted) == 10
    assert {type(one) for one in refused} == {InsufficientCapacity}


async def test_migrations_run_in_the_same_kind_of_session(
    servers: Servers, empty_database_url: str
) -> None:
    name = urlsplit(empty_database_url).path[1:]
    for setting in ("default_transaction_isolation = 'serializable'", "lock_timeout = '1ms'"):
        await execute(servers.database_url, f"ALTER DATABASE {name} SET {setting}")

    await migrations.upgrade(f"{empty_database_url}?prepared_statements=off")

    assert await migrations.differences(empty_database_url) is None


async def test_a_session_that_takes_no_writes_is_not_kept(
    servers: Servers, registry: Registry, database_url: str
) -> None:
    """As after a failover: what was opened meanwhile answers for ever, and never writes."""
    name = urlsplit(database_url).path[1:]
    read_only = f"ALTER DATABASE {name} SET default_transaction_read_only"
    await execute(servers.database_url, f"{read_only} = on")
    with pytest.raises(RegistryUnavailable, match="read-only"):
        await record(registry, update())
    with pytest.raises(RegistryUnavailable, match="read-only"):
        await registry.path.prove_writable()
    await execute(servers.database_url, f"{read_only} = off")

    await record(registry, update())
    await registry.path.prove_writable()


async def test_a_session_whose_role_lost_its_rights_is_not_kept(
    servers: Servers, database_url: str, database: Database
) -> None:
    """A right that is given back may count for new sessions only, as membership of a role does."""
    async with Pool.open(database_url, 1) as pool:
        async with pool.one() as connection:
            before = await connection.fetchval("SELECT pg_backend_pid()")

        async def read_without_rights() -> None:
            async with pool.one() as connection:
                await connection.execute("SET ROLE pg_monitor")
                await connection.execute("SELECT * FROM agent_registry")

        with pytest.raises(RegistryRefused):
            await read_without_rights()
        async with pool.one() as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") != before
            assert await connection.fetchval("SELECT count(*) FROM agent_registry") == 0


@needs_pgbouncer
@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_the_registry_works_behind_pgbouncer(empty_database_url: str, mode: str) -> None:
    async with pooling(empty_database_url, mode) as url:
        await migrations.upgrade(url)
        await migrations.upgrade(url)
        assert await migrations.differences(url) is None
        async with Registry.open(url) as registry:
            await migrations.require_head(registry)
            await record(registry, *(rig(gpu(0, 80.0)) for _ in range(4)))
            service = ReservationService(registry)
            outcomes = await asyncio.gather(
                *(service.reserve(request(gpu_vram_gb=16.0)) for _ in range(30)),
                *(registry.path.mark_fresh(0.0) for _ in range(10)),
                return_exceptions=True,
            )

    failed = [one for one in outcomes if isinstance(one, BaseException)]
    assert {type(one) for one in failed} == {InsufficientCapacity}
    assert len(failed) == 10


@needs_pgbouncer
async def test_behind_a_pooler_each_transaction_has_our_settings(odd_url: str) -> None:
    async with pooling(odd_url, "transaction") as url:
        ours = await shown(url, ["transaction_isolation", "TimeZone", "statement_timeout"])
        theirs = await asyncpg.connect(asyncpg_url(url), statement_cache_size=0)
        left = await theirs.fetchval("SHOW TimeZone")
        await theirs.close()

    assert ours == {
        "transaction_isolation": "read committed",
        "TimeZone": "UTC",
        "statement_timeout": "1min",
    }
    assert left == ODD["TimeZone"]


@needs_pgbouncer
async def test_a_pooler_is_found_out_by_each_of_those_that_come_at_once(
    database_url: str,
) -> None:
    async with pooling(database_url, "transaction") as url:
        sessions = Sessions(url)

        async def open_after(seconds: float) -> Any:
            await asyncio.sleep(seconds)
            return await sessions.connect()

        opened = await asyncio.gather(*(open_after(0.001 * number) for number in range(30)))
        caches = {one._config.statement_cache_size for one in opened}
        for one in opened:
            await one.close()

    assert caches == {0}


@needs_pgbouncer
async def test_with_a_session_for_each_statements_may_be_kept(database_url: str) -> None:
    async with pooling(database_url, "session") as url:
        found = f"{url}?prepared_statements=on"
        async with Pool.open(found, 1) as pool, pool.one() as connection:
            await connection.fetch("SELECT 1")
            kept = await connection.fetchval("SELECT count(*) FROM pg_prepared_statements")
            assert await connection.fetchval("SHOW jit") == "off"
    assert kept > 0


async def test_a_host_that_is_away_is_passed_over(database_url: str) -> None:
    parts = urlsplit(database_url)
    netloc = f"{parts.username}:{parts.password}@127.0.0.1:1,{parts.hostname}:{parts.port}"
    url = parts._replace(netloc=netloc).geturl()

    async with Registry.open(url) as registry:
        await migrations.require_head(registry)
        await record(registry, update())
    assert await migrations.differences(url) is None


async def test_hosts_that_are_all_away_are_all_named() -> None:
    async with Registry.open("postgresql://u:p@127.0.0.1:1,127.0.0.1:2/x") as registry:
        with pytest.raises(RegistryUnavailable, match=r"127\.0\.0\.1:1: .*; 127\.0\.0\.1:2: "):
            await registry.revision()


async def test_a_table_that_is_gone_is_refused_at_the_start(
    registry: Registry, database: Database
) -> None:
    await database.execute("ALTER TABLE wait_queue RENAME TO elsewhere")
    with pytest.raises(TablesMissing, match="wait_queue"):
        await migrations.require_head(registry)

    await database.execute("ALTER TABLE elsewhere RENAME TO wait_queue")
    await migrations.require_head(registry)
