"""A planner and an agent in Node, with amqplib: they know the contract and nothing of our code."""

import asyncio
import json
import os
import shutil
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from chiffon.registry.registry import Registry
from tests.fixtures.rooms import gpu, record, rig
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

PROGRAMS = Path(__file__).parents[1] / "fixtures" / "node"


def has_amqplib() -> bool:
    node = shutil.which("node")
    return node is not None and (
        subprocess.run([node, "-e", "require('amqplib')"], capture_output=True).returncode == 0
    )


pytestmark = pytest.mark.skipif(
    not has_amqplib(),
    reason="there is no Node with amqplib: npm install amqplib, and NODE_PATH",
)


@asynccontextmanager
async def node(program: str, *arguments: str) -> AsyncIterator[Process]:
    """Run a program of Node; it must end by itself, with 0."""
    process = await asyncio.create_subprocess_exec(
        *("node", str(PROGRAMS / program), *arguments),
        env={**os.environ},
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield process
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, errors.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_of(process: Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return json.loads(await process.stdout.readline())


async def test_a_planner_in_node_keeps_what_it_reserved_over_direct_reply_to(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """The broker returns a mandatory answer to direct reply-to although it delivers it."""
    await record(registry, rig(gpu(0, 24.0, 24.0), pool_name="node", interval_seconds=60.0))
    async with (
        orchestrating(amqp_url, database_url),
        node("planner.js", amqp_url, "node") as planner,
    ):
        first = await line_of(planner)
        assert (first["found"], first["made"]) == ("capacity.offers.v1", "capacity.reservation.v1")
        assert len(first["offers"]["agents"]) == 1
        reservation_id = UUID(first["reservation"]["reservation_id"])

        # An answer that nobody took is given back within a second of being sent.
        for _ in range(20):
            held = await registry.reservations.show(reservation_id)
            assert held is not None
            assert held.state == "held"
            await asyncio.sleep(0.1)

        assert planner.stdin is not None
        planner.stdin.write(b"go on\n")
        last = await line_of(planner)

    assert last["shown"]["state"] == last["renewed"]["state"] == "held"
    assert last["released"]["reason"] == "released"


async def test_an_agent_in_node_is_online_and_says_farewell(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    agent_id = uuid4()

    async def status() -> str | None:
        row = await registry.agents.show(agent_id)
        return None if row is None else row.status

    async with orchestrating(amqp_url, database_url):
        async with node("agent.js", amqp_url, "node", str(agent_id)) as agent:

            async def is_heard() -> bool:
                row = await registry.agents.show(agent_id)
                return row is not None and row.sequence >= 3

            await until(is_heard, "three heartbeats")
            assert await status() == "online"
            assert agent.stdin is not None
            agent.stdin.close()

        async def is_gone() -> bool:
            return await status() == "offline"

        await until(is_gone, "its farewell")
    row = await registry.agents.show(agent_id)
    assert row is not None
    assert row.status_reason == "farewell"
