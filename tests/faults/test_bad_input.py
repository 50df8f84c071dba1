"""Messages that nobody can read, among those of the fleet."""

import pytest

from chiffon.contract.codec import encode, routing_key
from tests.faults.conftest import Survives
from tests.faults.lab import Lab
from tests.fixtures import plain, raw
from tests.fixtures.bombs import BOMBS, KIND
from tests.fixtures.heartbeats import update
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

POISON = [b"", b"null", b"{", b"[]" * 9, b"\xff\xfe{}", b'{"agent_id": NaN}', b"x" * 70_000]


@pytest.mark.essential
async def test_poison_bodies_and_properties_harm_nobody_else(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        async def dead_letters() -> int:
            return (await plain.depth(lab.amqp_url, "chiffon.dead-letters"))[0]

        before = await dead_letters()
        async with plain.channel(lab.amqp_url) as to, raw.channel(lab.amqp_url) as bare:
            for body in POISON:
                kind = "status_update.v1"
                await plain.publish(to, "chiffon.heartbeats", "heartbeat.a.b.c", body, kind)
            for properties, _ in BOMBS.values():
                one = update()
                key = routing_key(one).encode()
                await bare.publish("chiffon.heartbeats", key, encode(one), {**KIND, **properties})

        async def all_are_set_aside() -> bool:
            return await dead_letters() - before == len(POISON) + len(BOMBS)

        await until(all_are_set_aside, "all of them among the dead letters")

    name = f"{len(POISON) + len(BOMBS)} messages that nobody can read"
    report = await survives(lab, name, fault)
    assert report.refused == 0
