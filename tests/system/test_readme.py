"""What the README says is run, not assumed."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from chiffon.settings import Settings
from tests.fixtures.command import run as chiffon
from tests.fixtures.heartbeats import update
from tests.fixtures.system import orchestrating

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
README = (PROJECT / "README.md").read_text()
TEXTS = [README, *(page.read_text() for page in sorted(DOCS.glob("*.md")))]
COMMANDS = sorted(
    {
        line.removeprefix("$ ")
        for text in TEXTS
        for line in text.splitlines()
        if line.startswith("$ chiffon ")
    }
)


def program(text: str, uses: str) -> str:
    """Return the program of a text that uses something."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [found] = [block for block in blocks if uses in block]
    return str(found)


async def run(source: str, folder: Path, **variables: str) -> str:
    """Run a program in a folder of its own."""
    done = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        source,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **variables},
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await done.communicate()
    assert done.returncode == 0, err.decode()
    return out.decode()


async def test_the_planner_example_prints_who_has_room(
    amqp_url: str, database_url: str, registry: Registry, tmp_path: Path
) -> None:
    await registry.heartbeats.record([Received(update(hostname="rig-7"), time.monotonic())])
    async with orchestrating(amqp_url, database_url):
        said = await run(program(README, "planner.find"), tmp_path, CHIFFON_AMQP_URL=amqp_url)

    assert said == "1 of the fleet can take it now\nrig-7 20.5 14\n"


async def test_the_agent_example_is_busy_and_then_says_farewell(
    amqp_url: str, database_url: str, registry: Registry, tmp_path: Path
) -> None:
    async with orchestrating(amqp_url, database_url):
        example = program((DOCS / "agents.md").read_text(), "BaseAgent")
        await run(example, tmp_path, CHIFFON_AMQP_URL=amqp_url)

    [agent] = await registry.agents.list()
    assert (agent.status, agent.capabilities) == ("offline", ["gpu"])
    assert agent.sequence >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documentation_exists(command: str) -> None:
    done = chiffon(*shlex.split(command)[1:], "--help")

    assert done.returncode == 0, done.stderr


def test_the_architecture_page_is_what_the_code_is() -> None:
    """``make architecture`` writes it."""
    drawn = subprocess.run(
        [sys.executable, str(DOCS / "draw_architecture.py"), "--print"],
        capture_output=True,
        text=True,
    )

    assert drawn.stdout == (DOCS / "architecture.md").read_text(), drawn.stderr


def test_every_setting_is_documented_and_no_other() -> None:
    named = set(re.findall(r"CHIFFON_[A-Z_]+", (DOCS / "settings.md").read_text()))

    assert named == {f"CHIFFON_{name.upper()}" for name in Settings.model_fields}
