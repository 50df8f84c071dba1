"""Taking room, waiting for it and draining agents on the command line."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from chiffon.registry.registry import Registry
from tests.fixtures.command import Done, commands
from tests.fixtures.rooms import gpu, record, rig
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

Run = Callable[..., Coroutine[Any, Any, Done]]


@pytest.fixture
async def run(amqp_url: str, database_url: str, tmp_path: Path) -> AsyncIterator[Run]:
    """Run a command while an orchestrator answers."""

    call = commands(amqp_url, database_url, tmp_path)

    async def later(*arguments: str) -> Done:
        return await asyncio.to_thread(call, *arguments)

    async with orchestrating(amqp_url, database_url):
        yield later


async def test_room_is_taken_shown_renewed_and_given_back(run: Run, registry: Registry) -> None:
    await record(registry, rig(gpu(0, 70.0), hostname="rig-7", interval_seconds=60.0))

    made = await run("capacity", "reserve", "--gpu-vram-gb", "20", "--holder", "me", "-o", "json")
    one = json.loads(made.stdout)
    listed = await run("reservation", "list")
    found = await run("capacity", "find", "--show-reserved")
    renewed = await run(
        "reservation", "renew", one["reservation_id"], "--lease-seconds", "600", "-o", "json"
    )
    released = await run("reservation", "release", one["reservation_id"], "-o", "json")
    late = await run("reservation", "renew", one["reservation_id"])
    none = await run("reservation", "list")

    assert (made.returncode, one["hostname"], one["state"]) == (0, "rig-7", "held")
    [header, row] = [line.split("\t") for line in listed.stdout.splitlines()]
    assert header[0] == "HOLDER"
    assert row[:3] == ["me", "rig-7", "1 x 20.0 GiB"]
    assert "50.0 GiB" in found.stdout
    assert "70.0 GiB" in found.stdout
    assert json.loads(renewed.stdout)["lease_seconds"] == 600
    assert json.loads(released.stdout)["state"] == "released"
    assert late.returncode == 3
    assert "its room may be another's" in late.stderr
    assert "nothing is reserved" in none.stderr


async def test_a_refusal_says_why_and_what_would_fit(run: Run, registry: Registry) -> None:
    await record(registry, rig(gpu(0, 30.0), hostname="rig-7", interval_seconds=60.0))

    refused = await run("capacity", "reserve", "--gpu-vram-gb", "40")
    found = await run("capacity", "find", "--min-gpu-vram-gb", "40", "--explain")
    bad = await run("capacity", "reserve")
    odd = await run("capacity", "reserve", "--cpu-cores", "1", "--alternative", "{")

    assert refused.returncode == 3
    assert refused.stderr == (
        "chiffon: no room: 1 agent: 1 too little free VRAM (best 30 of 40 on rig-7);"
        " with gpu_vram_gb 30, rig-7 would fit: type --gpu-vram-gb 30 (insufficient_capacity)\n"
    )
    assert found.returncode == 3
    assert "best 30 of 40 on rig-7" in found.stderr
    assert "with min_gpu_vram_gb 30, rig-7 would fit" in found.stderr
    assert bad.returncode == odd.returncode == 2
    assert "nothing to take" in bad.stderr
    assert "--alternative" in odd.stderr
    assert "Traceback" not in bad.stderr + odd.stderr


async def test_wait_ends_when_there_is_room_or_time_is_up(run: Run, registry: Registry) -> None:
    """Who waits is looked for once a second."""
    agent = rig(gpu(0, 50.0), hostname="rig-7", interval_seconds=60.0)
    wait = ("capacity", "wait", "--min-gpu-vram-gb", "40", "--timeout")
    late = await run(*wait, "0.5")
    waiting = asyncio.create_task(run(*wait, "60", "-o", "json"))

    async def stands_in_line() -> bool:
        return len(await registry.wait_queue.waiting()) == 1

    await until(stands_in_line, "it waits")
    await record(registry, agent)
    done = await waiting

    assert late.returncode == 3
    assert "no agent is known" in late.stderr
    assert (done.returncode, json.loads(done.stdout)["agents"][0]["hostname"]) == (0, "rig-7")


async def test_a_drained_agent_is_shown_with_what_it_holds(run: Run, registry: Registry) -> None:
    agent = rig(gpu(0, 50.0), hostname="rig-7", interval_seconds=60.0)
    await record(registry, agent)
    await run("capacity", "reserve", "--gpu-vram-gb", "20")

    drained = await run(
        "fleet", "drain", str(agent.agent_id), "--reason", "fans", "--deadline", "2h"
    )
    found = await run("capacity", "find", "--explain")
    listed = await run("fleet", "list")
    shown = json.loads((await run("fleet", "show", str(agent.agent_id), "-o", "json")).stdout)
    undrained = await run("fleet", "undrain", str(agent.agent_id))
    again = await run("capacity", "find")
    odd = await run("fleet", "drain", str(agent.agent_id), "--deadline", "soon")
    unknown = await run("fleet", "drain", "00000000-0000-0000-0000-000000000000")

    assert drained.returncode == 0
    assert "rig-7 is drained" in drained.stderr
    assert "1 x 20.0 GiB" in drained.stdout
    assert "is ended" in drained.stderr
    assert found.returncode == 3
    assert "1 drained" in found.stderr
    assert "online, drained" in listed.stdout
    assert (shown["drained"], shown["drain_reason"]) == (True, "fans")
    assert undrained.returncode == again.returncode == 0
    assert (odd.returncode, unknown.returncode) == (2, 3)


async def test_processes_are_tied_to_a_reservation(run: Run, tmp_path: Path) -> None:
    """An agent takes two samples of its processes."""
    reservation = "0f6b3a80-8a52-4a59-9f9d-0d1c3f6f8f11"

    tied = await run("agent", "tie", reservation, str(os.getpid()))
    probed = await run("agent", "probe", "-o", "json")
    unknown = await run("agent", "tie", reservation, "99999999")

    assert tied.returncode == 0
    [observed] = json.loads(probed.stdout)["resources"]["observed"]
    assert observed["reservation_id"] == reservation
    assert observed["memory_gb"] > 0
    assert unknown.returncode == 78
    assert "there is no process 99999999" in unknown.stderr
