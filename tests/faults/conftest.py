"""One system for all faults of a test process, and the table of what they did."""

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.faults import cluster, lab
from tests.faults.checker import Fault, Report, suffer
from tests.faults.lab import Lab

Survives = Callable[..., Awaitable[Report]]
Shown = Callable[[str, Report], None]

PROPERTY = "fault"
_REPORTS: list[dict[str, Any]] = []


# It logs each failed dial at ERROR; here they fail by the thousand.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=1, help="How often to inject each fault.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rounds = metafunc.config.getoption("--rounds")
    if rounds > 1:
        metafunc.fixturenames.append("round_")
        metafunc.parametrize("round_", range(rounds))


@asynccontextmanager
async def _in_a_folder(
    opened: Callable[[Path], AbstractAsyncContextManager[Lab]],
) -> AsyncIterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="chiffon-faults-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # the database's user must get in
        async with opened(Path(name)) as made:
            yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session", name="lab")
async def _lab() -> AsyncIterator[Lab]:
    async with _in_a_folder(lab.opened) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session", name="cluster_lab")
async def _cluster_lab() -> AsyncIterator[Lab]:
    async with _in_a_folder(cluster.opened) as made:
        yield made


@pytest.fixture
def shown(record_property: Callable[[str, object], None]) -> Shown:
    """Puts a fault into the table at the end."""

    def show(name: str, report: Report) -> None:
        record_property(PROPERTY, {"name": name, "is_sound": report.is_sound, **asdict(report)})

    return show


@pytest.fixture
def survives(shown: Shown) -> Survives:
    """Injects a fault and checks that nothing happened that may never be."""

    async def check(system: Lab, name: str, fault: Fault, **excuses: bool) -> Report:
        report = await suffer(system, fault, **excuses)
        shown(name, report)
        assert report.is_sound, report
        return report

    return check


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what was shown, in whichever process it ran."""
    if report.when == "call":
        _REPORTS.extend(value for name, value in report.user_properties if name == PROPERTY)  # type: ignore[misc]


_COLUMNS = {
    "BEATS": "beats",
    "LOST": "lost",
    "BACKWARD": "backward",
    "FALSE OFFLINE": "false_offlines",
    "RAISED": "resurrections",
    "TWICE": "doubled",
    "LATE": "late",
    "MARKED": "marked",
    "OUTLASTED": "outlasted",
    "ANSWERED": "answered",
    "REFUSED": "refused",
    "RECOVERY S": "recovery_seconds",
}


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fault did."""
    if not _REPORTS:
        return
    terminalreporter.section("faults")
    width = max(len(one["name"]) for one in _REPORTS)

    def line(name: str, cells: list[str]) -> None:
        padded = [cell.rjust(len(title)) for cell, title in zip(cells, _COLUMNS, strict=True)]
        terminalreporter.write_line(f"{name:<{width}}  {'  '.join(padded)}")

    line("FAULT", list(_COLUMNS))
    for one in sorted(_REPORTS, key=lambda one: str(one["name"])):
        line(one["name"], [f"{one[field]:g}" for field in _COLUMNS.values()])
    sums = [sum(one[field] for one in _REPORTS) for field in _COLUMNS.values()]
    sums[-1] = max(one["recovery_seconds"] for one in _REPORTS)
    line(f"all {len(_REPORTS)}, longest recovery", [f"{one:g}" for one in sums])
