"""Fixtures for all tests: the servers, and what each test has to itself."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import asyncpg
import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import declare
from chiffon.embedded.postgres import asyncpg_url
from chiffon.registry.registry import Registry
from tests.fixtures.plain import Queues
from tests.fixtures.servers import Management, Servers, new_database, running, virtual_host

# How long an example takes tells of the machine, not of the code.
settings.register_profile("chiffon", deadline=None)
settings.load_profile("chiffon")


TOGETHER = ("tests/system/test_page.py", "tests/faults/test_cluster.py")
"""The tests of each share a system that takes long to start, so one worker runs them."""


class KeptTogether(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out tests one by one, but for the modules ``TOGETHER``.

    The mark ``xdist_group`` does this no longer: pytest 9.2 has no ``_nodeid``, which pytest-xdist
    3.8 writes the group to.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if module in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> KeptTogether:
    return KeptTogether(config, log)


_SHARED = pytest.StashKey[tuple[ExitStack, Servers]]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Start the servers once for all of xdist's workers, in the process that hands out tests."""
    if _SHARED not in node.config.stash:
        stack = ExitStack()
        node.config.stash[_SHARED] = stack, stack.enter_context(running())
    node.workerinput["servers"] = asdict(node.config.stash[_SHARED][1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest, so that none of them runs alone at the end."""
    items.sort(
        key=lambda item: (TOGETHER[0] not in item.nodeid, "tests/system/" not in item.nodeid)
    )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, a program that a test lacks is a failure; what a machine cannot do is none."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "CI" not in os.environ or reporter is None:
        return
    if any("apt-get install" in reason for reason in _skipped(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name in one line what was not here, and so not tried."""
    skipped = _skipped(terminalreporter)
    if skipped:
        reasons = "; ".join(sorted(set(skipped)))
        terminalreporter.write_line(f"{len(skipped)} not tried: {reasons}", yellow=True)


def _skipped(reporter: pytest.TerminalReporter) -> list[str]:
    """Return why tests were skipped, one reason for each."""
    skipped = reporter.stats.get("skipped", [])
    return [str(one.longrepr[2]).removeprefix("Skipped: ") for one in skipped]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SHARED in config.stash:
        config.stash[_SHARED][0].close()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """The servers of this session, or those that the environment names."""
    shared = getattr(request.config, "workerinput", {}).get("servers")
    if shared is not None:
        yield Servers(**shared)
        return
    with running() as made:
        yield made


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
async def database_url(servers: Servers) -> AsyncIterator[str]:
    """A database at the newest revision, without rows."""
    async with new_database(servers, migrated=True) as url:
        yield url


@pytest.fixture
async def empty_database_url(servers: Servers) -> AsyncIterator[str]:
    """A database without tables."""
    async with new_database(servers, migrated=False) as url:
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
