"""A simulated fleet, whose heartbeats are lost, doubled and reordered, while things break."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.faults.lab import Lab, kill
from tests.fixtures import plain
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

OPTIONS = (
    *("--agents", "300", "--seconds", "30", "--interval-seconds", "2", "--connections", "10"),
    *("--loss", "0.05", "--duplicates", "0.1", "--reordering", "0.1", "--churn", "1"),
)


async def simulated(
    lab: Lab, *options: str, meanwhile: Callable[[], Awaitable[None]]
) -> tuple[int | None, dict[str, Any]]:
    """Return the exit code and the outcome of ``chiffon simulate``."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chiffon", "simulate", *OPTIONS, *options, "-o", "json"),
        env={
            **os.environ,
            "CHIFFON_AMQP_URL": lab.amqp_url,
            "CHIFFON_DATABASE_URL": lab.database_url,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await asyncio.gather(meanwhile())
    printed, _ = await running.communicate()
    return running.returncode, json.loads(printed)


async def test_nothing_differs_while_orchestrators_are_killed(lab: Lab) -> None:
    await until(lab.is_whole, "the lab whole again", 60)

    async def all_consume() -> bool:
        return (await plain.depth(lab.amqp_url, "chiffon.ingest"))[1] == len(lab.orchestrators)

    async def kill_one_after_the_other() -> None:
        for _ in range(4):
            await asyncio.sleep(2)
            lab.start_orchestrator()
            # Before that, both that are left might still be starting: then heartbeats expire.
            await until(all_consume, "the new one consumes")
            kill(lab.orchestrators.pop(0))

    code, outcome = await simulated(lab, meanwhile=kill_one_after_the_other)

    assert outcome["differences"] == []
    assert code == 0
    assert outcome["rows"] == 300
    assert min(outcome["counts"][what] for what in ("lost", "duplicated", "reordered", "left")) > 50
