"""One system for all faults, and the table of what they did."""

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.lab import Lab, Report, opened

REPORTS: dict[str, Report] = {}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def lab() -> AsyncIterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="chiffon-faults-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # the database's user must get in
        async with opened(Path(name)) as made:
            yield made


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each fault did."""
    if not REPORTS:
        return
    terminalreporter.section("faults")
    heading = ("FAULT", "BEATS", "LOST", "BACKWARD", "FALSE OFFLINE", "CUT OFF", "RECOVERY")
    terminalreporter.write_line("{:<44}{:>8}{:>6}{:>10}{:>15}{:>9}{:>10}".format(*heading))
    for name, one in REPORTS.items():
        terminalreporter.write_line(
            f"{name:<44}{one.beats:>8}{one.lost:>6}{one.backward:>10}{one.false_offlines:>15}"
            f"{one.cut_off:>9}{one.recovery_seconds:>8.1f} s"
        )
