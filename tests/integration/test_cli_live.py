"""Commands against a real broker and database."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures.command import Done, commands
from tests.fixtures.heartbeats import update
from tests.fixtures.system import orchestrating


@pytest.fixture
def chiffon(amqp_url: str, database_url: str, tmp_path: Path) -> Callable[..., Done]:
    """Run a command on this test's virtual host and database."""

    return commands(amqp_url, database_url, tmp_path)


async def test_the_fleet_and_its_capacity_are_shown(
    chiffon: Callable[..., Done], amqp_url: str, database_url: str, registry: Registry
) -> None:
    big = update(hostname="big", resources={"gpu_vram_available_gb": 24.0})
    away = update(hostname="away", status="offline")
    receipts = [Received(one, time.monotonic()) for one in (big, away)]
    await registry.heartbeats.record(sorted(receipts, key=lambda one: one.update.agent_id))
    async with orchestrating(amqp_url, database_url):

        async def run(*arguments: str) -> Done:
            return await asyncio.to_thread(chiffon, *arguments)

        listed = await run("fleet", "list", "-o", "json")
        assert {one["hostname"]: one["status"] for one in json.loads(listed.stdout)} == {
            "big": "online",
            "away": "offline",
        }
        plain = await run("fleet", "list", "--status", "online")
        [heading, line] = plain.stdout.splitlines()
        assert heading.split("\t")[0] == "HOST"
        assert line.split("\t")[-1] == str(big.agent_id)

        shown = await run("fleet", "show", str(big.agent_id), "-o", "json")
        assert json.loads(shown.stdout)["resources"]["gpu_vram_available_gb"] == 24.0
        assert (await run("fleet", "show", str(uuid4()))).returncode == 3

        found = await run("capacity", "find", "--min-gpu-vram-gb", "20", "-o", "json")
        assert [one["hostname"] for one in json.loads(found.stdout)["agents"]] == ["big"]
        nothing = await run("capacity", "find", "--min-gpu-vram-gb", "200", "-o", "jsonl")
        assert (nothing.returncode, nothing.stdout) == (3, "")
        assert "no agent can take this now" in nothing.stderr

        one = await run("capacity", "show", str(big.agent_id), "-o", "json")
        assert json.loads(one.stdout)["cpu_cores_available"] == 14
        unknown = await run("capacity", "show", str(uuid4()))
        assert unknown.returncode == 3
        assert "is not in the registry" in unknown.stderr

        assert (await run("fleet", "forget", str(away.agent_id))).returncode == 0
        again = await run("fleet", "forget", "big", str(away.agent_id))
        assert again.returncode == 3
        assert f"no agent has the id or host name '{away.agent_id}'" in again.stderr
        assert (await run("fleet", "forget", str(big.agent_id)[:9])).returncode == 0
        assert json.loads((await run("fleet", "list", "-o", "json")).stdout) == []


async def test_a_fleet_of_other_types_is_pointed_out_with_what_to_type(
    chiffon: Callable[..., Done], amqp_url: str, database_url: str, registry: Registry
) -> None:
    """The specification's filter is `desktop`, and a fleet of servers has none of those."""
    server = update(hostname="server", agent_type="infra")
    await registry.heartbeats.record([Received(server, time.monotonic())])
    async with orchestrating(amqp_url, database_url):

        async def run(*arguments: str) -> Done:
            return await asyncio.to_thread(chiffon, *arguments)

        found = await run("capacity", "find", "--min-gpu-vram-gb", "8")
        assert found.returncode == 3
        assert "1 of other types can (infra)" in found.stderr
        assert "type --agent-type any" in found.stderr
        explained = await run("capacity", "find", "--explain")
        assert "1 not of type desktop (1 of type infra would fit)" in explained.stderr
        assert "type --agent-type infra" in explained.stderr
        refused = await run("capacity", "reserve", "--cpu-cores", "1")
        assert refused.returncode == 3
        assert "type --agent-type infra" in refused.stderr
        assert "with agent_type infra, server would fit" in refused.stderr
        assert (await run("capacity", "find", "--agent-type", "any")).returncode == 0


def test_without_an_orchestrator_a_question_is_told_that_nobody_answers(
    chiffon: Callable[..., Done], broker: str
) -> None:
    done = chiffon("capacity", "find")

    assert done.returncode == 69
    assert "is an orchestrator running?" in done.stderr


def test_a_simulation_says_what_it_lacks(
    chiffon: Callable[..., Done], broker: str, amqp_url: str
) -> None:
    """It waits until it is sure that nobody answers."""
    short = chiffon("simulate", "--seconds", "20", "--interval-seconds", "1")
    assert short.returncode == 78
    assert "give it 23 s or more" in short.stderr

    alone = chiffon("simulate", "--seconds", "30", "--interval-seconds", "1")
    assert alone.returncode == 69
    assert "is an orchestrator running?" in alone.stderr


async def test_a_simulation_leaves_agents_of_others_alone(
    chiffon: Callable[..., Done], amqp_url: str, database_url: str, registry: Registry
) -> None:
    """A simulation runs to its end."""
    other = update(pool_name="simulated-7")
    await registry.heartbeats.record([Received(other, time.monotonic())])
    async with orchestrating(amqp_url, database_url):
        done = await asyncio.to_thread(
            chiffon, "simulate", "--seconds", "30", "--interval-seconds", "1", "--seed", "7"
        )

    assert done.returncode == 78
    assert "pool simulated-7 has 1 agents of somebody else" in done.stderr
    assert await registry.agents.show(other.agent_id) is not None


def test_the_topology_is_declared_and_checked(chiffon: Callable[..., Done]) -> None:
    before = chiffon("bus", "check", "-o", "json")
    assert before.returncode == 3
    assert {one["verdict"] for one in json.loads(before.stdout)} == {"missing"}

    assert chiffon("bus", "declare").returncode == 0

    after = chiffon("bus", "check")
    assert after.returncode == 0
    assert "missing" not in after.stdout


def test_the_database_is_upgraded_checked_and_taken_back(chiffon: Callable[..., Done]) -> None:
    """All migrations run, up and down."""
    assert chiffon("db", "current").stdout.strip() == "0006"
    assert chiffon("db", "check").returncode == 0
    assert chiffon("db", "downgrade", "0001").returncode == 0
    assert chiffon("db", "current").stdout.strip() == "0001"
    differs = chiffon("db", "check")
    assert differs.returncode == 3
    assert "Traceback" not in differs.stderr

    assert chiffon("db", "upgrade").returncode == 0
    assert chiffon("db", "check").returncode == 0


async def test_watch_prints_each_agent_and_again_when_it_changed(
    amqp_url: str, database_url: str, registry: Registry, tmp_path: Path
) -> None:
    agent_id = uuid4()
    await registry.heartbeats.record([Received(update(agent_id), time.monotonic())])
    watching = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "chiffon", "fleet", "watch", "-o", "jsonl", "--interval", "0.2"),
        env={
            **os.environ,
            "CHIFFON_DATABASE_URL": database_url,
            "CHIFFON_STATE_DIR": str(tmp_path),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    assert watching.stdout is not None
    async with asyncio.timeout(30):
        first = json.loads(await watching.stdout.readline())
        await registry.heartbeats.record(
            [Received(update(agent_id, sequence=2, status="busy"), time.monotonic())]
        )
        second = json.loads(await watching.stdout.readline())
        watching.terminate()
        await watching.wait()

    assert [(one["status"], one["sequence"]) for one in (first, second)] == [
        ("online", 1),
        ("busy", 2),
    ]
