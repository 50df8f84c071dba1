"""Fixtures for all tests: the servers, and what each test has to itself."""

import os
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import settings

from chiffon.provisioning import declare
from chiffon.registry import Registry, asyncpg_url
from chiffon.session import dial_any
from tests.fixtures.plain import Queues
from tests.fixtures.servers import Databases, Management, Servers, running, virtual_host

# How long an example takes tells of the machine, not of the code.
settings.register_profile("chiffon", deadline=None)
settings.load_profile("chiffon")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Start the servers once, or use those that the environment names."""
    with running() as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def databases(servers: Servers) -> AsyncIterator[Databases]:
    made = Databases(servers.database_url)
    await made.open()
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A test sees only the settings it makes; the servers were found before."""
    if {"amqp_url", "database_url", "empty_database_url"} & set(request.fixturenames):
        request.getfixturevalue("servers")
    for name in [name for name in os.environ if name.startswith("CHIFFON_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def management(servers: Servers) -> Management:
    return Management(servers.management_url)


@pytest.fixture
def amqp_url(servers: Servers) -> Iterator[str]:
    """An empty virtual host."""
    with virtual_host(servers) as url:
        yield url


@pytest.fixture
def queues(management: Management, amqp_url: str) -> Queues:
    return Queues(management, amqp_url)


@pytest.fixture
async def database_url(databases: Databases) -> AsyncIterator[str]:
    """A database at the newest revision, without rows."""
    async with databases.new(migrated=True) as url:
        yield url


@pytest.fixture
async def empty_database_url(databases: Databases) -> AsyncIterator[str]:
    """A database without tables."""
    async with databases.new(migrated=False) as url:
        yield url


@pytest.fixture
async def registry(database_url: str) -> AsyncIterator[Registry]:
    async with Registry.open(database_url) as opened:
        yield opened


@pytest.fixture
async def database(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A plain connection, as somebody who is not chiffon has it."""
    connection = await asyncpg.connect(asyncpg_url(database_url))
    yield connection
    await connection.close()


@pytest.fixture
async def broker(amqp_url: str) -> str:
    """A virtual host with the topology on it."""
    session = await dial_any(amqp_url, "test declares")
    await declare(session)
    await session.close()
    return amqp_url
