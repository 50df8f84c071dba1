"""What the README says is run, not assumed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chiffon.receipt import Receipt
from chiffon.registry import Registry
from chiffon.settings import Settings
from tests.fixtures.heartbeats import update
from tests.fixtures.system import orchestrating

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ chiffon ")}
)


async def run(program: str, amqp_url: str) -> str:
    import asyncio

    done = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        env={**os.environ, "CHIFFON_AMQP_URL": amqp_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await done.communicate()
    assert done.returncode == 0, err.decode()
    return out.decode()


async def test_the_planner_example_prints_who_has_room(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    await registry.record([Receipt(update(hostname="rig-7"), time.monotonic())])
    async with orchestrating(amqp_url, database_url):
        said = await run(PYTHON_BLOCKS[0], amqp_url)

    assert said == "rig-7 20.5 14\n"


async def test_the_agent_example_is_busy_and_then_says_farewell(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    async with orchestrating(amqp_url, database_url):
        await run(PYTHON_BLOCKS[1], amqp_url)

    [agent] = await registry.list_agents()
    assert (agent.status, agent.capabilities) == ("offline", ["gpu"])
    assert agent.sequence >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command: str) -> None:
    words = command.split()[1:]

    done = subprocess.run(
        [sys.executable, "-m", "chiffon", *words, "--help"], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


def test_every_setting_is_in_the_readme_and_no_other() -> None:
    named = set(re.findall(r"CHIFFON_[A-Z_]+", README))

    assert named == {f"CHIFFON_{name.upper()}" for name in Settings.model_fields}
