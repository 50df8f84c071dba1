"""The database's versions, up and down, on tables that hold rows."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from chiffon.capacity.service import OrchestratorService
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import BadConfiguration, RegistryUnavailable, TablesMissing
from chiffon.registry import migrations, session
from chiffon.registry.registry import Registry

PROJECT = Path(__file__).parents[2]

OLD_ROW = """
INSERT INTO agent_registry (agent_type, pool_name, status, agent_id)
VALUES ('desktop', 'default', 'online', gen_random_uuid()) RETURNING agent_id
"""


async def columns(connection: "asyncpg.Connection[asyncpg.Record]") -> set[str]:
    rows = await connection.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'agent_registry'"
    )
    return {row["column_name"] for row in rows}


async def indexes(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, str]:
    rows = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'agent_registry'"
    )
    return {row["indexname"]: row["indexdef"] for row in rows}


async def test_rows_that_were_there_before_metrics_keep_working(empty_database_url: str) -> None:
    await migrations.upgrade(empty_database_url, "0001")
    connection = await asyncpg.connect(asyncpg_url(empty_database_url))
    assert "resource_metrics" not in await columns(connection)
    agent_id = await connection.fetchval(OLD_ROW)

    await migrations.upgrade(empty_database_url)

    kept = await connection.fetchval(
        "SELECT resource_metrics FROM agent_registry WHERE agent_id = $1", agent_id
    )
    assert json.loads(kept) == {}
    index = (await indexes(connection))["idx_agent_registry_resource_metrics"]
    assert "USING gin (resource_metrics jsonb_path_ops)" in index
    async with Registry.open(empty_database_url) as registry:
        answer = await OrchestratorService(registry).get_agent_capacity(agent_id)
    assert (answer["gpu_type"], answer["gpu_vram_available_gb"], answer["timestamp"]) == (
        "none",
        0.0,
        None,
    )
    await connection.close()


async def test_downgrades_take_away_what_upgrades_brought_and_keep_the_rows(
    empty_database_url: str,
) -> None:
    await migrations.upgrade(empty_database_url)
    connection = await asyncpg.connect(asyncpg_url(empty_database_url))
    agent_id = await connection.fetchval(OLD_ROW)
    await connection.execute(
        """UPDATE agent_registry SET resource_metrics = '{"cpu_percent": 1}'"""
    )

    await migrations.downgrade(empty_database_url, "0001")

    assert "resource_metrics" not in await columns(connection)
    assert "idx_agent_registry_resource_metrics" not in await indexes(connection)
    assert await connection.fetchval("SELECT agent_id FROM agent_registry") == agent_id

    await migrations.upgrade(empty_database_url)
    assert await connection.fetchval("SELECT resource_metrics FROM agent_registry") == "{}"

    await migrations.downgrade(empty_database_url, "base")
    assert await columns(connection) == set()
    await connection.close()


def test_an_upgrade_twice_at_once_is_one_upgrade(empty_database_url: str) -> None:
    """All migrations run twice."""
    program = (
        "import asyncio, sys; from chiffon.registry import migrations\n"
        "asyncio.run(migrations.upgrade(sys.argv[1]))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_database_url], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]

    said = [one.communicate(timeout=60)[1] for one in both]

    assert [one.returncode for one in both] == [0, 0], said
    assert asyncio.run(migrations.differences(empty_database_url)) is None


async def test_the_tables_of_the_code_are_the_tables_of_the_database(database_url: str) -> None:
    assert await migrations.differences(database_url) is None


async def test_a_difference_is_found(database_url: str) -> None:
    connection = await asyncpg.connect(asyncpg_url(database_url))
    await connection.execute("ALTER TABLE agent_registry DROP COLUMN hostname")
    await connection.close()

    assert "hostname" in (await migrations.differences(database_url) or "")


async def test_an_unknown_revision_is_named(empty_database_url: str) -> None:
    with pytest.raises(BadConfiguration, match="0999"):
        await migrations.upgrade(empty_database_url, "0999")


async def test_a_database_that_is_too_old_is_refused_with_what_to_do(
    empty_database_url: str,
) -> None:
    async with Registry.open(empty_database_url) as registry:
        with pytest.raises(TablesMissing, match="chiffon db upgrade"):
            await migrations.require_head(registry)
        await migrations.upgrade(empty_database_url, "0002")
        with pytest.raises(TablesMissing, match="at revision 0002"):
            await migrations.require_head(registry)
        await migrations.upgrade(empty_database_url)
        await migrations.require_head(registry)


async def test_a_database_that_is_away_is_one_line() -> None:
    with pytest.raises(RegistryUnavailable, match="failed us"):
        await migrations.upgrade("postgresql://u:p@127.0.0.1:1/x")


def test_the_alembic_command_itself_works(empty_database_url: str) -> None:
    """It is a process of its own, started three times."""
    environment = {**os.environ, "CHIFFON_DATABASE_URL": empty_database_url}
    for command in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *command],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


async def test_another_programs_alembic_is_none_of_ours(empty_database_url: str) -> None:
    connection = await asyncpg.connect(asyncpg_url(empty_database_url))
    await connection.execute("CREATE TABLE alembic_version (version_num text PRIMARY KEY)")
    await connection.execute("INSERT INTO alembic_version VALUES ('0006'), ('cafe12345678')")
    await connection.execute("CREATE TABLE theirs (id int)")

    async with Registry.open(empty_database_url) as registry:
        with pytest.raises(TablesMissing, match="no chiffon tables yet"):
            await migrations.require_head(registry)
        await migrations.upgrade(empty_database_url)
        await migrations.require_head(registry)

    assert await migrations.differences(empty_database_url) is None
    assert await connection.fetchval("SELECT count(*) FROM alembic_version") == 2
    await connection.close()


async def test_a_revision_that_we_do_not_know_is_refused(
    registry: Registry, database_url: str
) -> None:
    connection = await asyncpg.connect(asyncpg_url(database_url))
    await connection.execute("UPDATE chiffon_version SET version_num = '9999'")
    await connection.close()

    with pytest.raises(TablesMissing, match="9999, which this chiffon does not know: a newer one"):
        await migrations.require_head(registry)
    with pytest.raises(TablesMissing, match="9999"):
        await migrations.upgrade(database_url)


async def test_a_migration_takes_as_long_as_it_takes(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index over many rows takes longer than a question may."""
    await migrations.upgrade(empty_database_url, "0005")
    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(session, "SETTINGS", {**session.SETTINGS, "statement_timeout": "500ms"})
    connection = await asyncpg.connect(asyncpg_url(empty_database_url))
    async with connection.transaction():
        await connection.execute("LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
        upgrading = asyncio.create_task(migrations._run("upgrade", empty_database_url, "head"))
        await asyncio.sleep(2)  # four times as long
        waiting = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
        assert waiting > 0
    await upgrading
    assert await connection.fetchval("SELECT version_num FROM chiffon_version") == "0006"
    await connection.close()
