"""The broker is killed, frozen, stopped, short of memory and disk, and loses what is bound."""

import asyncio

import aio_pika
import pytest

from chiffon.amqp.connection import dial
from chiffon.contract.messages import CANARY
from tests.faults.conftest import Survives
from tests.faults.lab import Lab
from tests.fixtures import plain
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]


async def test_it_closes_every_connection(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        sessions = [agent._supervised.current for agent in lab.agents]
        await asyncio.to_thread(lab.rabbitmqctl, "close_all_connections", "-p", "chiffon", "a test")

        async def all_lost() -> bool:
            return all(connection is not None and connection.lost.done() for connection in sessions)

        await until(all_lost, "the fault: every connection lost")

    await survives(lab, "broker closes every connection", fault)


async def test_it_is_stopped_and_started_in_order(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        await asyncio.to_thread(lab.rabbitmqctl, "stop_app")
        before = lab.beats()
        await asyncio.sleep(4)
        assert lab.beats() == before, "heartbeats went on"
        await asyncio.to_thread(lab.rabbitmqctl, "start_app")

    await survives(lab, "broker stopped for 4 s", fault)


@pytest.mark.parametrize("seconds", [pytest.param(0, marks=pytest.mark.essential), 10])
async def test_it_is_killed_and_started_again(lab: Lab, survives: Survives, seconds: int) -> None:
    """10 s are two leases."""

    async def fault() -> None:
        lab.broker.kill()
        await asyncio.sleep(seconds)
        lab.broker.start()

    await survives(lab, f"broker killed (-9), away for {seconds} s", fault)


@pytest.mark.parametrize("seconds", [4, 25])
async def test_it_is_frozen(lab: Lab, survives: Survives, seconds: int) -> None:
    """25 s is longer than the AMQP heartbeat's 18: publishes in flight are cancelled by nobody."""

    async def fault() -> None:
        before = lab.beats()
        lab.broker.freeze()
        await asyncio.sleep(seconds)
        assert lab.broker.is_frozen
        assert lab.beats() - before < len(lab.agents), "heartbeats went on"
        lab.broker.thaw()

    await survives(lab, f"broker frozen for {seconds} s", fault)
    assert all(not agent._task.done() for agent in lab.agents), "a heartbeat loop has died"


@pytest.mark.parametrize(
    ("what", "alarm", "mend"),
    [
        ("memory", ("set_vm_memory_high_watermark", "0.00001"), "0.6"),
        ("disk", ("set_disk_free_limit", "999GB"), "50MB"),
    ],
)
async def test_an_alarm_blocks_publishers(
    lab: Lab, survives: Survives, what: str, alarm: tuple[str, str], mend: str
) -> None:
    async def fault() -> None:
        await asyncio.to_thread(lab.rabbitmqctl, *alarm)

        async def is_blocked() -> bool:
            sessions = [agent._supervised.current for agent in lab.agents]
            return all(connection is not None and connection.is_blocked for connection in sessions)

        await until(is_blocked, "the fault: every agent is told to wait")
        await asyncio.sleep(8)
        await asyncio.to_thread(lab.rabbitmqctl, alarm[0], mend)

    await survives(lab, f"{what} alarm for 8 s", fault)


async def test_the_binding_of_heartbeats_is_lost(lab: Lab, survives: Survives) -> None:
    """Nobody is told of it but those who publish; it is made again all the same."""

    async def fault() -> None:
        connection = await dial(lab.amqp_url, "unbinds")
        channel = await connection.channel(confirms=False)
        await channel.queue_unbind("chiffon.ingest", "chiffon.heartbeats", "heartbeat.#")
        await connection.close()

        async def is_routed() -> bool:
            async with plain.channel(lab.amqp_url) as to:
                try:
                    await plain.publish(to, "chiffon.heartbeats", "heartbeat.x", b"{}", CANARY)
                except aio_pika.exceptions.DeliveryError:
                    return False
            return True

        assert not await is_routed(), "heartbeats were still routed"
        await until(is_routed, "the binding is made again")

    await survives(lab, "binding of heartbeats deleted", fault)


async def test_the_queue_of_heartbeats_is_deleted(lab: Lab, survives: Survives) -> None:
    """Its consumers are told that it is over, and make it anew."""

    async def fault() -> None:
        connection = await dial(lab.amqp_url, "deletes")
        channel = await connection.channel(confirms=False)
        for _ in range(3):
            deleted = await channel.queue_delete("chiffon.ingest")
            assert deleted.message_count is not None
            await asyncio.sleep(2)
        await connection.close()

    await survives(lab, "queue of heartbeats deleted, three times", fault)
