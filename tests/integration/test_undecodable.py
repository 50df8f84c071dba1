"""Messages whose AMQP properties no library can decode, sent over a bare socket."""

import asyncio
import json
from uuid import uuid4

import pytest

from chiffon import PlannerClient
from chiffon.contract.codec import encode, routing_key
from chiffon.contract.messages import CapacityQuery
from chiffon.registry.registry import Registry
from tests.fixtures import plain, raw
from tests.fixtures.bombs import BOMBS, KIND, nested, short
from tests.fixtures.command import run_apart
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.system import consumers, orchestrating
from tests.fixtures.waiting import until


async def test_no_property_stops_ingest_and_each_is_set_aside_with_its_reason(
    amqp_url: str, database_url: str, registry: Registry, queues: Queues
) -> None:
    before, after = update(), update()
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as to:
        await plain.publish(
            to, "chiffon.heartbeats", routing_key(before), encode(before), "status_update.v1"
        )
        async with raw.channel(amqp_url) as publisher:
            for name, (properties, _) in BOMBS.items():
                one = update(hostname=name)
                await publisher.publish(
                    "chiffon.heartbeats",
                    routing_key(one).encode(),
                    encode(one),
                    {**KIND, **properties},
                )
            # Neither does a routing key.
            await publisher.publish("chiffon.heartbeats", b"heartbeat.\xff" * 20, b"{}", KIND)
        await plain.publish(
            to, "chiffon.heartbeats", routing_key(after), encode(after), "status_update.v1"
        )

        async def is_recorded() -> bool:
            return await registry.agents.show(after.agent_id) is not None

        await until(is_recorded, "the heartbeat after them")
        assert await consumers(amqp_url, "chiffon.ingest") == 1
        recorded = await registry.agents.list()

    assert {agent.agent_id for agent in recorded} == {before.agent_id, after.agent_id}
    reasons = {}
    for dead in queues.take("chiffon.dead-letters"):
        body = json.loads(dead["payload"])
        reasons[body.get("hostname")] = dead["properties"]["headers"]["chiffon-reason"]
    assert len(reasons) == len(BOMBS) + 1
    for name, (_, reason) in BOMBS.items():
        assert reason in reasons[name], name
    assert queues.take("chiffon.ingest") == []


async def test_no_property_stops_the_responder_or_a_planner(
    amqp_url: str, database_url: str, queues: Queues
) -> None:
    kind = {"message_type": short(b"capacity.find.v1")}
    async with orchestrating(amqp_url, database_url), PlannerClient.open(amqp_url) as planner:
        await planner.find(CapacityQuery())
        async with raw.channel(amqp_url) as publisher:
            for properties, _ in BOMBS.values():
                await publisher.publish("chiffon.rpc", b"capacity", b"{}", {**kind, **properties})
            # And into the planner's own queue, as anybody may who knows its name.
            [name] = [name for name in queues.names() if name.startswith("amq.gen")]
            for properties, _ in BOMBS.values():
                await publisher.publish("", name.encode(), b"{}", {**kind, **properties})
        answer = await planner.find(CapacityQuery())

        async def are_set_aside() -> bool:
            return (await plain.depth(amqp_url, "chiffon.dead-letters"))[0] == len(BOMBS)

        await until(are_set_aside, "a dead letter each")

    assert answer.agents == []


async def test_dead_letters_that_cannot_be_decoded_are_listed(broker: str, amqp_url: str) -> None:
    """In a process of its own: one that has run an orchestrator decodes them anyway."""
    async with raw.channel(broker) as publisher:
        for properties, _ in BOMBS.values():
            await publisher.publish("", b"chiffon.dead-letters", b"{}", {**KIND, **properties})

    done = await asyncio.to_thread(
        run_apart, "bus", "dead-letters", "list", "-o", "json", CHIFFON_AMQP_URL=amqp_url
    )

    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(BOMBS)


@pytest.mark.parametrize("depth", [1, 400])
async def test_headers_that_can_be_read_are_no_reason_to_refuse(
    amqp_url: str, database_url: str, registry: Registry, depth: int
) -> None:
    one = update(agent_id=uuid4())
    async with orchestrating(amqp_url, database_url):
        async with raw.channel(amqp_url) as publisher:
            await publisher.publish(
                "chiffon.heartbeats",
                routing_key(one).encode(),
                encode(one),
                {**KIND, "headers": nested(depth)},
            )

        async def is_recorded() -> bool:
            return await registry.agents.show(one.agent_id) is not None

        await until(is_recorded, "the heartbeat")
