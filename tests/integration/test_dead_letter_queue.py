"""``chiffon bus dead-letters``: looking, replaying, purging."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from chiffon.contract.codec import encode, routing_key
from chiffon.contract.messages import StatusUpdate
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.command import Done, commands
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until


@pytest.fixture
def letters(broker: str, database_url: str, tmp_path: Any) -> Callable[..., Any]:
    """Run the command without stopping the loop."""

    chiffon = commands(broker, database_url, tmp_path)

    async def run(*arguments: str) -> Done:
        return await asyncio.to_thread(chiffon, "bus", "dead-letters", *arguments)

    return run


async def refused(broker: str, count: int) -> list[StatusUpdate]:
    """Have heartbeats set aside: they come with a wrong type."""
    updates = [update(hostname=f"rig-{index}") for index in range(count)]
    async with plain.channel(broker) as to:
        for one in updates:
            await plain.publish(to, "chiffon.heartbeats", routing_key(one), encode(one), "wrong.v1")

    async def are_set_aside() -> bool:
        return (await plain.depth(broker, "chiffon.dead-letters"))[0] == count

    await until(are_set_aside, f"{count} dead letters")
    return updates


async def test_they_are_listed_and_shown_with_their_reasons_and_stay(
    broker: str, database_url: str, letters: Callable[..., Any]
) -> None:
    nothing = await letters("list")
    assert (nothing.returncode, nothing.stderr) == (0, "no dead letters\n")
    async with orchestrating(broker, database_url):
        updates = await refused(broker, 3)

    listed = json.loads((await letters("list", "-o", "json")).stdout)
    shown = await letters("show", listed[1]["letter_id"][:8], "-o", "json")
    again = json.loads((await letters("list", "-o", "json")).stdout)

    assert [json.loads(one["body"])["hostname"] for one in listed] == ["rig-0", "rig-1", "rig-2"]
    assert listed[0]["routing_key"] == routing_key(updates[0])
    assert listed[0]["reason"] == "type 'wrong.v1' is not status_update.v1"
    assert listed[0]["age_seconds"] < 30
    assert json.loads(shown.stdout)["letter_id"] == listed[1]["letter_id"]
    assert [one["letter_id"] for one in again] == [one["letter_id"] for one in listed]
    assert (await letters("show", "ffffffffffff")).returncode == 3


async def test_a_replay_after_the_cause_is_mended_is_recorded_and_may_be_repeated(
    broker: str,
    database_url: str,
    registry: Registry,
    letters: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with orchestrating(broker, database_url):
        updates = await refused(broker, 2)
        # Mended: the type is understood now.
        monkeypatch.setattr("chiffon.orchestrator.batch.STATUS_UPDATE", "wrong.v1")
        done = await letters("replay", "--all")
        assert done.stderr == "replayed 2 dead letters\n"

        async def are_recorded() -> bool:
            return len(await registry.agents.list()) == 2

        await until(are_recorded, "both heartbeats")
        first = await registry.agents.show(updates[0].agent_id)
        async with plain.channel(broker) as to:  # the same once more
            await plain.publish(
                to,
                "chiffon.heartbeats",
                routing_key(updates[0]),
                encode(updates[0]),
                "wrong.v1",
                headers={"chiffon-held-ms": 1},
            )
        last = update()
        async with plain.channel(broker) as to:
            await plain.publish(
                to, "chiffon.heartbeats", routing_key(last), encode(last), "wrong.v1"
            )

        async def is_through() -> bool:
            return await registry.agents.show(last.agent_id) is not None

        await until(is_through, "what was published after it")
        again = await registry.agents.show(updates[0].agent_id)

    assert first is not None
    assert again is not None
    assert again.last_heartbeat_at == first.last_heartbeat_at
    assert (await letters("replay", "--all")).returncode == 3


async def test_a_replayed_heartbeat_that_outlived_its_lease_raises_nobody(
    broker: str, database_url: str, registry: Registry, queues: Queues
) -> None:
    old, forged, young = update(), update(), update()
    farewell = update(status="offline", resources=None)
    async with orchestrating(broker, database_url):
        async with plain.channel(broker) as to:
            for one, held_ms in (
                (old, 3_600_000),
                (forged, 2**62),
                (farewell, 3_600_000),
                (young, 4_000),
            ):
                await plain.publish(
                    to,
                    "chiffon.heartbeats",
                    routing_key(one),
                    encode(one),
                    "status_update.v1",
                    headers={"chiffon-held-ms": held_ms},
                )

        async def is_recorded() -> bool:
            return await registry.agents.show(young.agent_id) is not None

        await until(is_recorded, "the young one")
        rows = {row.agent_id: row for row in await registry.agents.list()}

    assert set(rows) == {farewell.agent_id, young.agent_id}
    assert queues.take("chiffon.dead-letters") == []
    assert rows[farewell.agent_id].status == "offline"
    assert (rows[young.agent_id].age_seconds or 0) >= 4.0


async def test_letters_are_purged_one_by_one_or_all(
    broker: str, database_url: str, letters: Callable[..., Any], queues: Queues
) -> None:
    async with orchestrating(broker, database_url):
        await refused(broker, 3)
    listed = json.loads((await letters("list", "-o", "json")).stdout)

    assert (await letters("purge")).returncode == 2
    assert (await letters("purge", "ffffffffffff")).returncode == 3
    one = await letters("purge", listed[1]["letter_id"])
    left = json.loads((await letters("list", "-o", "json")).stdout)
    rest = await letters("purge", "--all")

    assert one.stderr == "purged 1 dead letter\n"
    assert [letter["letter_id"] for letter in left] == [
        listed[0]["letter_id"],
        listed[2]["letter_id"],
    ]
    assert rest.stderr == "purged 2 dead letters\n"
    assert queues.take("chiffon.dead-letters") == []
