"""What an agent host has to have installed, and how fast the command answers."""

import subprocess
import sys

import pytest

HEAVY = {"sqlalchemy", "sqlmodel", "asyncpg", "alembic", "fastapi", "typer", "rich"}


@pytest.mark.parametrize("module", ["chiffon.agent", "chiffon.planner.client"])
def test_an_agent_or_planner_loads_no_sql_web_or_terminal_library(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"

    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()

    assert set(loaded) & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["capacity", "find", "--help"]])
def test_help_loads_nothing_that_only_a_running_command_needs(arguments: list[str]) -> None:
    program = (
        "import sys; from chiffon.cli import main; sys.argv[1:] = sys.argv[1:]; code = main()\n"
        "print(*sys.modules, file=sys.stderr); sys.exit(code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )

    assert done.returncode == 0
    slow = (HEAVY - {"typer"}) | {"aio_pika", "psutil"}
    assert set(done.stderr.split()) & slow == set()
