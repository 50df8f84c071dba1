"""The agent as a library class, on a real broker."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from chiffon import BaseAgent
from chiffon.agent.identity import Identity
from chiffon.amqp.connection import dial, dial_any
from chiffon.amqp.declare import declare
from chiffon.contract.messages import ResourceMetrics
from chiffon.embedded import rabbitmq
from chiffon.embedded.rabbitmq import RabbitMQ
from chiffon.errors import NotTaken, Unroutable
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.reader import Reader
from tests.fixtures import plain
from tests.fixtures.nvml import Card, FakeNvml
from tests.fixtures.servers import Management
from tests.fixtures.trees import plant
from tests.fixtures.waiting import until

PROJECT = Path(__file__).parents[2]


class Inbox:
    """What the broker got, as somebody who is not chiffon sees it."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    @classmethod
    @asynccontextmanager
    async def open(cls, amqp_url: str) -> "AsyncIterator[Inbox]":
        async with plain.channel(amqp_url) as channel:
            yield cls(await channel.get_queue("chiffon.ingest"))

    async def next(self) -> Any:
        async def message() -> Any:
            return await self._queue.get(fail=False, no_ack=True)

        return await until(message, "a heartbeat")

    async def body(self) -> dict[str, Any]:
        return dict(json.loads((await self.next()).body))

    async def until_status(self, status: str) -> dict[str, Any]:
        while True:
            body = await self.body()
            if body["status"] == status:
                return body


@pytest.fixture
async def inbox(broker: str) -> Any:
    async with Inbox.open(broker) as opened:
        yield opened


async def test_the_first_heartbeat_comes_at_once_and_says_who_and_what(
    broker: str, inbox: Inbox
) -> None:
    who = Identity(uuid4(), 1_767_225_600_000)
    agent = BaseAgent(
        broker,
        identity=who,
        agent_type="code",
        pool_name="lab",
        capabilities=["gpu"],
        interval_seconds=60.0,
        hostname="rig-7",
    )
    async with agent:
        message = await inbox.next()

    body = json.loads(message.body)
    assert message.routing_key == f"heartbeat.lab.code.{who.agent_id}"
    assert (message.type, message.content_type) == ("status_update.v1", "application/json")
    assert message.expiration == 180.0
    assert (body["agent_id"], body["incarnation"], body["sequence"]) == (
        str(who.agent_id),
        who.incarnation,
        1,
    )
    assert (body["hostname"], body["capabilities"], body["status"]) == ("rig-7", ["gpu"], "online")
    resources = body["resources"]
    assert resources["cpu_cores_available"] is not None, "two samples were taken before"
    assert resources["memory_available_gb"] > 0


async def test_heartbeats_follow_one_another_in_order(broker: str, inbox: Inbox) -> None:
    async with BaseAgent(broker, interval_seconds=0.5):
        sequences = [(await inbox.body())["sequence"] for _ in range(3)]

    assert sequences == [1, 2, 3]


async def test_a_farewell_is_sent_at_the_end_and_does_not_expire(broker: str, inbox: Inbox) -> None:
    async with BaseAgent(broker, interval_seconds=60.0):
        await inbox.next()

    farewell = await inbox.next()
    body = json.loads(farewell.body)
    assert (body["status"], body["sequence"], farewell.expiration) == ("offline", 2, None)


async def test_a_changed_status_goes_out_at_once(broker: str, inbox: Inbox) -> None:
    async with BaseAgent(broker, interval_seconds=600.0) as agent:
        await inbox.until_status("online")

        agent.status = "busy"

        assert (await inbox.until_status("busy"))["sequence"] == 2


async def test_changed_capabilities_go_out_at_once_and_bad_ones_are_refused(
    broker: str, inbox: Inbox
) -> None:
    async with BaseAgent(broker, interval_seconds=600.0, capabilities=["a"]) as agent:
        await inbox.next()

        with pytest.raises(ValidationError):
            agent.capabilities = ["not a word"]
        assert agent.capabilities == ["a"]
        agent.capabilities = ["b"]

        assert (await inbox.body())["capabilities"] == ["b"]


async def test_a_heartbeat_can_be_sent_by_hand(broker: str, inbox: Inbox) -> None:
    async with BaseAgent(broker, interval_seconds=600.0) as agent:
        await inbox.next()

        sent = await agent.send_heartbeat()

        assert (await inbox.body())["sequence"] == sent.sequence == 2


@pytest.mark.parametrize(
    "fields",
    [{"interval_seconds": 0.1}, {"pool_name": "a.b"}, {"agent_type": "x"}, {"hostname": "a\nb"}],
)
async def test_what_the_contract_does_not_allow_is_refused_before_anything_is_sent(
    fields: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError):
        BaseAgent("amqp://h/", **fields)


async def test_after_a_cut_one_fresh_heartbeat_comes_at_once(
    broker: str, inbox: Inbox, management: Management
) -> None:
    """The broker lists a new connection after a second, and only then can it be cut."""
    async with BaseAgent(broker, interval_seconds=600.0) as agent:
        await inbox.next()

        await plain.cut(management, broker, str(agent.identity.agent_id))

        assert (await inbox.body())["sequence"] == 2


async def test_an_agent_waits_for_a_broker_that_is_not_ready_and_keeps_nothing(
    amqp_url: str,
) -> None:
    """It starts before any orchestrator has declared the exchange, with a short interval."""
    async with BaseAgent(amqp_url, interval_seconds=0.5):
        await asyncio.sleep(2)  # four heartbeats would have been due
        connection = await dial(amqp_url, "test")
        await declare(connection)
        await connection.close()
        async with plain.channel(amqp_url) as channel:
            inbox = Inbox(await channel.get_queue("chiffon.ingest"))

            assert (await inbox.body())["sequence"] <= 2


async def test_an_unroutable_heartbeat_is_told_and_does_not_cost_the_connection(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with plain.channel(amqp_url) as channel:
        exchange = await channel.declare_exchange("chiffon.heartbeats", "topic", durable=True)
        async with BaseAgent(amqp_url, interval_seconds=600.0) as agent:

            async def told() -> bool:
                return "heartbeats are lost" in caplog.text

            await until(told, "a warning")
            with pytest.raises(Unroutable):
                await agent.send_heartbeat()
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind(exchange, "heartbeat.#")

            await agent.send_heartbeat()

            assert (await Inbox(queue).body())["status"] == "online"
            assert "lost the broker" not in caplog.text


async def test_a_heartbeat_that_a_queue_did_not_take_is_not_sent_again_at_once(
    broker: str, inbox: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    async def told() -> bool:
        return "heartbeats are lost" in caplog.text

    async with (
        plain.full_queue(broker, "chiffon.heartbeats", "#"),
        BaseAgent(broker, interval_seconds=600.0) as agent,
    ):
        await until(told, "a warning")
        with pytest.raises(NotTaken):
            await agent.send_heartbeat()

        assert [(await inbox.body())["sequence"] for _ in range(2)] == [1, 2]
        assert "lost the broker" not in caplog.text

    assert (await inbox.body())["status"] == "offline"


async def test_probes_that_fail_do_not_stop_the_heartbeat(broker: str, inbox: Inbox) -> None:
    class Broken:
        def read(self) -> ResourceMetrics:
            raise OSError("the bus is on fire")

        def close(self) -> None:
            pass

    async with BaseAgent(broker, resources=Broken()):
        body = await inbox.body()

    assert body["resources"]["probe_errors"] == ["the probes failed: OSError"]
    assert body["resources"]["gpu_vram_available_gb"] is None


async def test_a_driver_that_hangs_for_ever_stops_no_heartbeat_and_they_say_how_old_it_is(
    broker: str, inbox: Inbox, tmp_path: Path
) -> None:
    """The reading has to become seconds old."""
    nvml = FakeNvml([Card()])
    source = NvidiaProbe(plant(tmp_path, "nvidia-one"), nvml).read
    try:
        with closing(await Reader.open(0.5, sources={"nvidia": source})) as reader:
            async with BaseAgent(broker, interval_seconds=0.5, resources=reader):
                first = await inbox.body()
                nvml.hangs.set()
                ages = [
                    (await inbox.body())["resources"]["gpu_sample_age_seconds"] for _ in range(5)
                ]
    finally:
        nvml.freed.set()

    assert first["resources"]["gpu_vram_available_gb"] == 20.0
    assert ages[-1] > ages[1] + 1.0  # three intervals of half a second later


HANGING_AGENT = """
import asyncio, sys
from pathlib import Path
from chiffon import BaseAgent
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.reader import Reader
from tests.fixtures.nvml import Card, FakeNvml

async def main():
    nvml = FakeNvml([Card()])
    nvml.hangs.set()  # and never freed
    reader = await Reader.open(sources={"nvidia": NvidiaProbe(Path(sys.argv[2]), nvml).read})
    async with BaseAgent(sys.argv[1], resources=reader) as agent:
        await agent.send_heartbeat()
    reader.close()

asyncio.run(main())
print("stopped")
"""


async def test_a_driver_that_hangs_for_ever_does_not_keep_an_agent_from_stopping(
    broker: str, inbox: Inbox, tmp_path: Path
) -> None:
    """A process of its own is started."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HANGING_AGENT,
        broker,
        str(plant(tmp_path, "nvidia-one")),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate()

    assert (process.returncode, said) == (0, b"stopped\n")
    spoken = await inbox.body()
    assert spoken["resources"]["gpu_type"] == "nvidia"
    assert spoken["resources"]["probe_errors"][0].startswith("nvidia: no answer yet")
    assert (await inbox.until_status("offline"))["agent_id"] == spoken["agent_id"]


@pytest.mark.deep
async def test_an_agent_that_an_alarm_blocks_keeps_its_connection_and_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An alarm is the whole broker's, so it has one of its own."""
    with tempfile.TemporaryDirectory(prefix="chiffon-alarm-") as folder:
        async with rabbitmq.run(Path(folder), stop_gently=False) as node:
            await _blocked_by_an_alarm(node, caplog)


async def _blocked_by_an_alarm(node: RabbitMQ, caplog: pytest.LogCaptureFixture) -> None:
    async def alarm(watermark: str) -> None:
        argv = [str(node.program.with_name("rabbitmqctl")), "set_vm_memory_high_watermark"]
        done = await asyncio.create_subprocess_exec(*argv, watermark, env=node.environment)
        assert await done.wait() == 0

    declaring = await dial_any(node.amqp_url, "test declares")
    await declare(declaring)
    await declaring.close()
    async with (
        Inbox.open(node.amqp_url) as inbox,
        BaseAgent(node.amqp_url, interval_seconds=0.5) as agent,
    ):
        await inbox.next()
        connection = agent._supervised.current
        assert connection is not None
        try:
            await alarm("0.00001")

            async def blocked() -> bool:
                return connection.is_blocked and "not confirmed" in caplog.text

            await until(blocked, "the agent blocked, and told so")
        finally:
            await alarm("0.6")
        before = agent._sequence

        async def fresh() -> bool:
            return bool((await inbox.body())["sequence"] > before)

        await until(fresh, "a heartbeat that was read after the alarm")
        assert agent._supervised.current is connection, "it dialled again"
