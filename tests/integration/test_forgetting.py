"""Agents that are gone for good leave no row behind."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

import asyncpg
import pytest

from chiffon import BaseAgent
from chiffon.capacity.reservations import ReservationService
from chiffon.errors import BadConfiguration
from chiffon.orchestrator import process
from chiffon.orchestrator.forgetting import Forgetting
from chiffon.registry.registry import Registry
from tests.fixtures.command import commands
from tests.fixtures.heartbeats import update
from tests.fixtures.resources import FixedResources
from tests.fixtures.rooms import gpu, record, request, rig
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

DAY = 86_400.0

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Gone: TypeAlias = Callable[..., Awaitable[UUID]]


@pytest.fixture
def gone(registry: Registry, database: Database) -> Gone:
    """Make an agent that went away some days ago."""

    async def make(days: float, *, reason: str = "farewell", pool: str = "default") -> UUID:
        one = update(hostname=f"{reason}-{days:g}", pool_name=pool)
        await record(registry, one)
        await database.execute(
            "UPDATE agent_registry SET status = 'offline', status_reason = $2, status_changed_at ="
            " now() - $3 * interval '1 day' WHERE agent_id = $1",
            *(one.agent_id, reason, days),
        )
        return one.agent_id

    return make


async def left(registry: Registry) -> set[UUID]:
    return {row.agent_id for row in await registry.agents.list(None, None, None)}


async def test_who_said_farewell_long_ago_is_forgotten_and_others_are_not(
    registry: Registry, gone: Gone
) -> None:
    long_gone, never_named = await gone(8), await gone(8, reason="missed heartbeats")
    lately, online = await gone(6), update()
    await record(registry, online)

    await Forgetting(registry.agents, 7 * DAY).forget()

    assert await left(registry) == {lately, online.agent_id}
    assert not {long_gone, never_named} & await left(registry)


async def test_who_is_drained_named_scored_or_reserved_on_is_kept(
    registry: Registry, database: Database, gone: Gone
) -> None:
    drained, named = await gone(8), await gone(8, reason="missed heartbeats")
    scored, named_with_farewell = await gone(8, reason="connection closed"), await gone(8)
    await registry.agents.drain(drained, "broken fan", None)
    for one in (named, named_with_farewell):
        await registry.agents.drain(one, None, None)
        await registry.agents.undrain(one)
    await database.execute(
        "UPDATE agent_registry SET performance_score = 2 WHERE agent_id = $1", scored
    )
    holding = rig(gpu(0, 80.0))
    await record(registry, holding)
    await ReservationService(registry).reserve(request(gpu_vram_gb=8.0))
    await database.execute(
        "UPDATE agent_registry SET status = 'offline', status_reason = 'farewell',"
        " status_changed_at = now() - interval '8 days' WHERE agent_id = $1",
        holding.agent_id,
    )

    await Forgetting(registry.agents, 7 * DAY).forget()

    assert await left(registry) == {drained, named, scored, holding.agent_id}


async def test_nobody_is_forgotten_where_that_is_off(registry: Registry, gone: Gone) -> None:
    one = await gone(5_000)

    await Forgetting(registry.agents, 0).forget()

    assert await left(registry) == {one}


async def test_more_than_fit_into_one_statement_are_all_forgotten(
    registry: Registry, gone: Gone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chiffon.registry.agents.FORGOTTEN_AT_ONCE", 2)
    for _ in range(5):
        await gone(8)

    await Forgetting(registry.agents, 7 * DAY).forget()

    assert await left(registry) == set()


async def test_an_orchestrator_forgets(
    amqp_url: str,
    database_url: str,
    registry: Registry,
    gone: Gone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "FORGET_SECONDS", 0.1)
    one, other = await gone(2), await gone(0.5)
    async with orchestrating(amqp_url, database_url, forget_offline_after_seconds=DAY):

        async def is_forgotten() -> bool:
            return one not in await left(registry)

        await until(is_forgotten, "it is forgotten")
    assert await left(registry) == {other}


async def test_an_operator_sees_whom_before_they_are_forgotten(
    registry: Registry, gone: Gone, database_url: str, tmp_path: Path
) -> None:
    chiffon = commands("amqp://nobody:x@127.0.0.1:1/", database_url, tmp_path)
    old, other_pool = await gone(3, pool="notebooks"), await gone(3)
    lately, drained = await gone(1, pool="notebooks"), await gone(4, pool="notebooks")
    await registry.agents.drain(drained, None, None)
    words = ("fleet", "forget", "--offline-for", "2d", "--pool", "notebooks")

    previewed = chiffon(*words, "-o", "json")
    assert str(old) in previewed.stdout
    assert previewed.stdout.count("agent_id") == 1
    assert "1 agent would be forgotten; --yes does it" in previewed.stderr
    assert old in await left(registry)

    done = chiffon(*words, "--yes")
    assert "forgot 1 agent" in done.stderr
    assert await left(registry) == {other_pool, lately, drained}

    assert chiffon("fleet", "forget").returncode == 2
    assert chiffon("fleet", "forget", "--offline-for", "soon").returncode == 2
    assert chiffon("fleet", "forget", "x", "--offline-for", "1d").returncode == 2


async def test_an_agent_with_a_state_folder_is_the_same_after_a_restart(
    broker: str, tmp_path: Path
) -> None:
    async with BaseAgent(broker, state_folder=tmp_path, resources=FixedResources()) as first:
        await first.send_heartbeat()
        with pytest.raises(BadConfiguration, match="another agent runs"):
            await BaseAgent(broker, state_folder=tmp_path).__aenter__()
    async with BaseAgent(broker, state_folder=tmp_path, resources=FixedResources()) as second:
        await second.send_heartbeat()

    assert second.identity.agent_id == first.identity.agent_id
    assert second.identity.incarnation > first.identity.incarnation
