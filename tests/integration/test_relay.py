"""The relay between agents and a real broker."""

import asyncio
import contextlib
import json
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen
from uuid import uuid4

import aio_pika
import aiormq
import pytest
from pamqp import commands, frame

from chiffon import guest, session
from chiffon.agent import BaseAgent
from chiffon.embedded.children import free_port
from chiffon.encoding import encode, routing_key
from chiffon.errors import BadConfiguration, BusRefused, BusUnavailable, NotTaken
from chiffon.messages import StatusUpdate
from chiffon.registry import Registry
from tests.fixtures import plain, raw
from tests.fixtures.heartbeats import update
from tests.fixtures.proxy import Proxy
from tests.fixtures.relay import relaying
from tests.fixtures.resources import NoResources
from tests.fixtures.servers import Management, Servers
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

HEARTBEATS = "chiffon.heartbeats"


class Overheard:
    """What the broker was given to route, as somebody who is not chiffon sees it."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    async def next(self) -> Any:
        async def message() -> Any:
            return await self._queue.get(fail=False, no_ack=True)

        return await until(message, "a message")

    async def agents(self) -> list[str]:
        """Return the ids in the next array."""
        return [one["agent_id"] for one in json.loads((await self.next()).body)]


@pytest.fixture
async def overheard(broker: str) -> AsyncIterator[Overheard]:
    async with plain.channel(broker) as channel:
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(HEARTBEATS, "heartbeat.#")
        yield Overheard(queue)


async def send(to: Any, heartbeat: StatusUpdate, **properties: Any) -> None:
    properties = {"kind": "status_update.v1", **properties}
    await plain.publish(to, HEARTBEATS, routing_key(heartbeat), encode(heartbeat), **properties)


async def test_agents_behind_a_relay_are_in_the_registry_and_say_farewell(
    amqp_url: str, database_url: str, registry: Registry, management: Management
) -> None:
    async with orchestrating(amqp_url, database_url), relaying(amqp_url) as url:
        agents = [BaseAgent(url, resources=NoResources(), pool_name="lab") for _ in range(20)]

        async def connections() -> list[str]:
            vhost = urlsplit(amqp_url).path[1:]
            listed = management.call("GET", f"vhosts/{vhost}/connections")
            names = [str(one.get("client_properties", {}).get("connection_name")) for one in listed]
            return names if "relay test" in names else []

        async def statuses() -> list[str | None]:
            rows = [await registry.show(agent.identity.agent_id) for agent in agents]
            return [None if row is None else row.status for row in rows]

        async def all_are(status: str) -> bool:
            return set(await statuses()) == {status}

        async with asyncio.TaskGroup() as group:
            entering = [group.create_task(agent.__aenter__()) for agent in agents]
        assert all(one.done() for one in entering)
        await until(lambda: all_are("online"), "all of them online")
        names = await until(connections, "the broker's list of connections")
        async with asyncio.TaskGroup() as group:
            for agent in agents:
                group.create_task(agent.__aexit__())
        await until(lambda: all_are("offline"), "the farewell of each")
        row = await registry.show(agents[0].identity.agent_id)

    assert row is not None
    assert row.status_reason == "farewell"
    assert not {str(agent.identity.agent_id) for agent in agents} & set(names)


async def test_heartbeats_that_come_together_go_on_as_one_array_with_the_newest_of_each(
    broker: str, overheard: Overheard
) -> None:
    first, other = update(), update()
    newer = update(first.agent_id, sequence=2)
    async with relaying(broker, relay_seconds=0.5) as url, plain.channel(url) as to:
        await asyncio.gather(send(to, first), send(to, other), send(to, newer))
        message = await overheard.next()

    assert message.routing_key == "heartbeat.default.relay.test"
    assert (message.type, message.content_type) == ("status_update.v1", "application/json")
    assert 14.0 <= message.expiration <= 15.0
    assert 0 <= message.headers["chiffon-held-ms"] < 1_000
    assert {one["agent_id"]: one["sequence"] for one in json.loads(message.body)} == {
        str(first.agent_id): 2,
        str(other.agent_id): 1,
    }


async def test_a_confirm_comes_after_that_of_the_broker(broker: str) -> None:
    """The proxy behind the relay swallows what the broker would confirm."""
    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker), relay_seconds=0.01) as url,
        plain.channel(url) as to,
    ):
        await send(to, update())
        proxy.swallows = True
        sending = asyncio.create_task(send(to, update()))
        await asyncio.wait({sending}, timeout=1.0)
        assert proxy.swallowed_bytes, "the fault was not injected"
        assert not sending.done()
        proxy.swallows = False
        await asyncio.wait_for(sending, 30)


async def test_what_no_queue_takes_is_not_confirmed(broker: str) -> None:
    async with relaying(broker) as url, BaseAgent(url, resources=NoResources()) as agent:
        await agent.send_heartbeat()
        async with plain.full_queue(broker, HEARTBEATS, "#"):
            with pytest.raises(NotTaken):
                await agent.send_heartbeat()
        await agent.send_heartbeat()


async def test_what_nobody_can_read_is_set_aside_with_its_reason_and_costs_nothing_else(
    broker: str, overheard: Overheard
) -> None:
    good, strange = update(), update()
    key = routing_key(good)
    async with (
        plain.channel(broker) as looking,
        relaying(broker, relay_seconds=0.5) as url,
        plain.channel(url) as to,
        plain.channel(url) as other,
    ):
        dead = await looking.get_queue("chiffon.dead-letters")
        outcomes = await asyncio.gather(
            plain.publish(to, HEARTBEATS, key, b"{not json", "status_update.v1"),
            plain.publish(to, HEARTBEATS, key, encode(strange), "status_update.v1"),
            plain.publish(to, HEARTBEATS, key, encode(good), "status_update.v9"),
            plain.publish(to, HEARTBEATS, "heartbeat.chiffon.canary.x", b"{}", "canary.v1"),
            send(other, good),
            return_exceptions=True,
        )

        async def letter() -> Any:
            return await dead.get(no_ack=True, fail=False)

        letters = [await until(letter, "a dead letter") for _ in range(4)]
        assert await overheard.agents() == [str(good.agent_id)]

    assert [type(one) for one in outcomes] == [
        *[aio_pika.exceptions.DeliveryError] * 4,
        type(None),
    ], "who sent it is told that it was not taken"
    reasons = sorted(str(one.headers["chiffon-reason"]) for one in letters)
    assert [reason.partition(" ")[0] for reason in reasons] == ["a", "not", "routing", "type"]


async def test_dead_letters_that_cannot_be_written_hold_nobody_up(
    broker: str, overheard: Overheard, management: Management
) -> None:
    """The broker does not let the relay write there."""
    vhost, user = urlsplit(broker).path[1:], f"relay-{uuid4().hex}"
    management.call("PUT", f"users/{user}", {"password": "secret", "tags": ""})
    try:
        may = {"configure": "^$", "write": r"^chiffon\.heartbeats$", "read": "^$"}
        management.call("PUT", f"permissions/{vhost}/{user}", may)
        parts = urlsplit(broker)
        own = parts._replace(netloc=f"{user}:secret@{parts.hostname}:{parts.port}").geturl()
        async with (
            relaying(own) as url,
            plain.channel(url) as bad,
            BaseAgent(url, interval_seconds=0.5, resources=NoResources()) as agent,
        ):
            for _ in range(3):
                with pytest.raises(aio_pika.exceptions.DeliveryError):
                    await plain.publish(bad, HEARTBEATS, "x", b"{", "status_update.v1")
                await asyncio.wait_for(agent.send_heartbeat(), 1.5)
            assert agent._link.connections_made == 1
            assert await overheard.agents() == [str(agent.identity.agent_id)]
    finally:
        management.call("DELETE", f"users/{user}")


async def test_an_agent_that_starts_while_the_broker_is_away_speaks_after_it(
    broker: str, overheard: Overheard
) -> None:
    """It dials the relay for longer than two of its AMQP heartbeats, 10 s."""
    async with Proxy.to(broker).running() as proxy:
        proxy.resets_after_bytes = 0
        async with relaying(proxy.url(broker)) as url:
            early = BaseAgent(url, interval_seconds=0.5, resources=NoResources())
            await early.__aenter__()
            await asyncio.sleep(0.5)  # its first heartbeat has the relay see that nobody is there
            late = BaseAgent(url, interval_seconds=0.5, resources=NoResources())
            await late.__aenter__()
            await asyncio.sleep(11)
            assert (early.heartbeats_confirmed, late.heartbeats_confirmed) == (0, 0)
            proxy.resets_after_bytes = None

            async def both_are_heard() -> bool:
                return bool(early.heartbeats_confirmed and late.heartbeats_confirmed)

            await until(both_are_heard, "a confirmed heartbeat of each")
            assert late._link.connections_made == 1
            await early.__aexit__()
            await late.__aexit__()


async def test_a_confirm_of_a_closed_channel_is_not_given_to_the_next(broker: str) -> None:
    """Its number is that of another channel by then."""
    first, second = update(), update()
    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker), relay_seconds=0.2) as url,
        raw.channel(url) as bare,
    ):
        proxy.swallows = True
        await bare.send_message(HEARTBEATS, routing_key(first), encode(first))
        await asyncio.sleep(0.4)  # it is on its way
        await bare.send(commands.Channel.Close(200, "", 0, 0))
        await bare.until(commands.Channel.CloseOk)
        await bare.send(commands.Channel.Open())
        await bare.send(commands.Confirm.Select())
        await bare.until(commands.Confirm.SelectOk)
        await bare.send_message(HEARTBEATS, routing_key(second), encode(second))
        confirming = asyncio.create_task(bare.until(commands.Basic.Ack))
        await asyncio.wait({confirming}, timeout=0.5)
        assert not confirming.done()
        proxy.swallows = False
        await asyncio.wait_for(confirming, 30)


async def test_an_agent_keeps_its_connection_while_the_broker_is_away_and_speaks_after_it(
    broker: str, overheard: Overheard
) -> None:
    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker)) as url,
        BaseAgent(url, interval_seconds=0.5, resources=NoResources()) as agent,
    ):
        await overheard.next()
        current = agent._link.current
        assert current is not None
        proxy.resets_after_bytes = 0

        async def is_told() -> bool:
            return current.is_blocked

        await until(is_told, "the agent is told that the relay's broker is away")
        assert proxy.resets, "the fault was not injected"
        before = agent._sequence
        proxy.resets_after_bytes = None

        async def speaks() -> bool:
            heard = json.loads((await overheard.next()).body)
            return bool(heard[0]["sequence"] > before)

        await until(speaks, "a heartbeat that was read after the outage")
        assert agent._link.connections_made == 1


async def test_an_alarm_of_the_broker_blocks_the_agents_behind_a_relay(
    broker: str, servers: Servers
) -> None:
    async with (
        relaying(broker) as url,
        BaseAgent(url, interval_seconds=0.5, resources=NoResources()) as agent,
    ):
        await agent.send_heartbeat()
        current = agent._link.current
        assert current is not None
        try:
            await asyncio.to_thread(servers.rabbitmqctl, "set_vm_memory_high_watermark", "0.00001")

            async def is_told() -> bool:
                return current.is_blocked

            await until(is_told, "the agent is told")
        finally:
            await asyncio.to_thread(servers.rabbitmqctl, "set_vm_memory_high_watermark", "0.6")
        confirmed = agent.heartbeats_confirmed

        async def is_heard() -> bool:
            return agent.heartbeats_confirmed > confirmed

        await until(is_heard, "a confirm after the alarm")
        assert agent._link.current is current, "it dialled again"


async def test_what_outlived_its_lease_in_a_relay_goes_nowhere_and_a_farewell_does(
    broker: str, overheard: Overheard
) -> None:
    ghost = update(interval_seconds=0.5)
    gone = update(interval_seconds=0.5, status="offline")
    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker)) as url,
        plain.channel(url) as to,
        plain.channel(url) as another,
    ):
        proxy.resets_after_bytes = 0
        waiting = [
            asyncio.create_task(send(over, one)) for over, one in ((to, ghost), (another, gone))
        ]
        await asyncio.wait(waiting, timeout=5.5)  # a lease is 5 s
        assert not any(one.done() for one in waiting)
        proxy.resets_after_bytes = None
        message = await overheard.next()
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(outcomes[0], aio_pika.exceptions.DeliveryError), "it was not taken"
    assert outcomes[1] is None
    assert [one["agent_id"] for one in json.loads(message.body)] == [str(gone.agent_id)]
    assert message.headers["chiffon-held-ms"] >= 5_000
    assert message.expiration is None
    assert message.delivery_mode == 2


async def test_heartbeats_are_as_old_in_the_registry_as_they_are(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    held = update(interval_seconds=60.0)
    async with (
        orchestrating(amqp_url, database_url),
        Proxy.to(amqp_url).running() as proxy,
        relaying(proxy.url(amqp_url)) as url,
        plain.channel(url) as to,
    ):
        proxy.resets_after_bytes = 0
        sent = time.monotonic()
        sending = asyncio.create_task(send(to, held))
        await asyncio.wait({sending}, timeout=4.0)
        proxy.resets_after_bytes = None

        async def row() -> Any:
            return await registry.show(held.agent_id)

        found = await until(row, "the heartbeat in the registry")
        assert 4.0 - 1.2 <= found.age_seconds <= time.monotonic() - sent
        await asyncio.wait_for(sending, 30)


async def test_it_says_whether_it_can_do_its_work_and_what_it_did(broker: str) -> None:
    port = free_port()

    def read(path: str) -> str:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as page:
                return str(page.read().decode())
        except HTTPError as error:
            return error.read().decode()

    async def says(path: str, wanted: str) -> bool:
        return wanted in await asyncio.to_thread(read, path)

    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker), metrics_port=port) as url,
        plain.channel(url) as to,
    ):
        await send(to, update())
        assert await says("/readyz", "ok")
        assert await says("/metrics", "chiffon_relay_connections 1.0")
        assert await says("/metrics", "chiffon_relay_heartbeats_forwarded_total")
        proxy.resets_after_bytes = 0
        sending = asyncio.create_task(send(to, update()))
        await until(lambda: says("/readyz?verbose", "[-]broker failed"), "not ready")
        proxy.resets_after_bytes = None
        await asyncio.wait_for(sending, 30)


async def test_a_stopped_relay_forwards_what_it_holds(broker: str, overheard: Overheard) -> None:
    last = update()
    async with relaying(broker, relay_seconds=0.5) as url, plain.channel(url) as to:
        sending = asyncio.create_task(send(to, last))
        await asyncio.wait({sending}, timeout=0.2)  # less than it gathers
        assert not sending.done()

    assert await overheard.agents() == [str(last.agent_id)]
    await asyncio.wait({sending})


async def test_whoever_asks_a_relay_for_more_is_told_so_as_by_a_broker(broker: str) -> None:
    async with relaying(broker) as url:
        async with plain.channel(url) as to:
            with pytest.raises(aiormq.exceptions.ChannelNotFoundEntity, match="no exchange 'chif"):
                await to.get_exchange("chiffon.rpc")
        async with plain.channel(url) as to:
            with pytest.raises(aiormq.exceptions.ChannelPreconditionFailed):
                await to.declare_exchange(HEARTBEATS, aio_pika.ExchangeType.FANOUT)
        async with plain.channel(url) as to:
            await to.declare_exchange(HEARTBEATS, aio_pika.ExchangeType.TOPIC, durable=True)
            await to.set_qos(10)
        async with raw.channel(url) as bare:
            await bare.send(commands.Queue.Declare(queue="mine"))
            with pytest.raises(AssertionError, match=r"NOT_IMPLEMENTED.*no queue\.declare"):
                await bare.until(commands.Queue.DeclareOk)
        async with raw.channel(url) as bare:
            with pytest.raises(AssertionError, match="no exchange 'elsewhere'"):
                await bare.publish("elsewhere", b"key", b"body", {})
        async with raw.channel(url) as bare:
            await bare.send(commands.Confirm.Select(), 7)
            with pytest.raises(AssertionError, match=r"expected 'channel\.open'"):
                await bare.until(commands.Confirm.SelectOk)


async def test_a_channel_that_was_closed_may_be_opened_again(broker: str) -> None:
    async with relaying(broker) as url, raw.channel(url) as bare:
        with pytest.raises(AssertionError, match="no exchange"):
            await bare.publish("elsewhere", b"key", b"body", {})
        await bare.send(commands.Basic.Publish(exchange=HEARTBEATS, routing_key="x"))
        await bare.send(commands.Channel.CloseOk())
        await bare.send(commands.Channel.Open())
        await bare.until(commands.Channel.OpenOk)
        await bare.send(commands.Channel.Close(200, "", 0, 0))
        await bare.until(commands.Channel.CloseOk)


async def test_only_who_has_the_login_is_let_in(broker: str) -> None:
    async with relaying(broker, relay_login="agent:right") as url:
        wrong = url.replace("anything", "wrong")
        with pytest.raises(BusRefused, match="wrong password"):
            await session.dial(wrong, "test")
        opened = await session.dial(url.replace("anything", "right"), "test")
        await opened.close()


async def test_a_relay_that_others_can_reach_needs_a_login(broker: str) -> None:
    with pytest.raises(BadConfiguration, match="CHIFFON_RELAY_LOGIN"):
        async with relaying(broker, relay_host="0.0.0.0"):
            pass
    with pytest.raises(BadConfiguration, match="CHIFFON_RELAY_PORT: cannot listen"):
        async with relaying(broker) as url, relaying(broker, relay_port=urlsplit(url).port):
            pass
    with pytest.raises(BadConfiguration, match="CHIFFON_RELAY_CERTIFICATE"):
        async with relaying(broker, relay_certificate="/nowhere"):
            pass


async def test_agents_may_dial_it_over_tls(
    broker: str, overheard: Overheard, certificate: Path
) -> None:
    files = {
        "relay_certificate": certificate / "certificate.pem",
        "relay_key": certificate / "key.pem",
    }
    async with relaying(broker, **files) as url:
        encrypted = url.replace("amqp:", "amqps:") + f"?cafile={certificate / 'certificate.pem'}"
        async with BaseAgent(encrypted, resources=NoResources()) as agent:
            assert await overheard.agents() == [str(agent.identity.agent_id)]
        with pytest.raises(BusUnavailable):
            await session.dial(url, "test")


@asynccontextmanager
async def stranger(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"AMQP\0\0\x09\x01"),
        (b"AMQP\0\0\x09\x01" + b"\xff" * 100, b"FRAME_ERROR"),
        (
            b"AMQP\0\0\x09\x01" + frame.marshal(commands.Channel.Open(), 1),
            b"COMMAND_INVALID - channel.open in the handshake",
        ),
        (b"AMQP\0\0\x09\x01" + struct.pack(">BHI", 1, 0, 2**31) + b"\0", b"FRAME_ERROR"),
    ],
)
async def test_a_stranger_is_told_what_is_wrong_and_cut_off(
    broker: str, said: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "CLOSE_SECONDS", 0.2)
    async with relaying(broker) as url, stranger(url) as (reader, writer):
        writer.write(said)
        assert answer in await asyncio.wait_for(reader.read(), 10)


async def test_messages_are_not_taken_before_the_login(broker: str) -> None:
    async with relaying(broker) as url, stranger(url) as (reader, writer):
        publish = frame.marshal(commands.Basic.Publish(exchange=HEARTBEATS, routing_key="x"), 1)
        writer.write(b"AMQP\0\0\x09\x01" + publish)
        assert b"on no open channel" in await asyncio.wait_for(reader.read(), 10)


async def test_a_client_that_reads_nothing_is_cut_off_and_holds_up_no_end(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest, "UNREAD_BYTES", 10_000)
    looks = frame.marshal(commands.Exchange.Declare(exchange=HEARTBEATS, passive=True), 1) * 5_000
    async with relaying(broker) as url, raw.channel(url) as bare:
        with contextlib.suppress(ConnectionError):
            while not bare.is_closing:
                bare.write(looks)
                await asyncio.sleep(0.01)


async def test_names_that_are_too_long_for_the_protocol_are_cut(broker: str) -> None:
    async with relaying(broker) as url, raw.channel(url) as bare:
        with pytest.raises(AssertionError, match="NOT_FOUND - a relay has no exchange"):
            await bare.publish("\U0001f600" * 63, b"key", b"body", {})


async def test_who_says_nothing_is_cut_off(broker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "HANDSHAKE_SECONDS", 0.2)
    async with relaying(broker) as url, stranger(url) as (reader, _):
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def test_a_client_that_falls_silent_is_cut_off_after_two_heartbeats(broker: str) -> None:
    async with relaying(broker) as url, Proxy.to(url).running() as proxy:
        opened = await session.dial(f"{proxy.url(url)}?heartbeat=1", "test")
        proxy.swallows = True
        async with asyncio.timeout(15):
            await opened.lost
        await opened.close()


async def test_of_a_client_that_sends_faster_than_the_broker_takes_no_more_is_read(
    broker: str,
) -> None:
    """It writes until its own socket takes no more: what was read would be 60 MB."""
    one = update()
    many = raw.message(HEARTBEATS, routing_key(one), encode(one)) * 200
    async with (
        Proxy.to(broker).running() as proxy,
        relaying(proxy.url(broker), relay_seconds=0.01) as url,
        raw.channel(url) as bare,
    ):
        proxy.swallows = True

        async def write() -> None:
            for _ in range(60_000_000 // len(many)):
                bare.write(many)
                await asyncio.wait_for(bare.drain(), 3)

        with pytest.raises(TimeoutError):
            await write()
        assert proxy.swallowed_bytes, "the fault was not injected"
        proxy.swallows = False
        await asyncio.wait_for(bare.drain(), 30)


async def test_a_killed_relay_loses_nothing_that_it_confirmed(
    amqp_url: str, database_url: str, registry: Registry, tmp_path: Path
) -> None:
    log = tmp_path / "relay.log"
    async with relaying(amqp_url) as url:
        port = urlsplit(url).port  # free a moment later

    @asynccontextmanager
    async def process() -> AsyncIterator[asyncio.subprocess.Process]:
        with log.open("ab") as output:
            running = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chiffon", "relay", "run", "--relay-port", str(port)),
                env={**os.environ, "CHIFFON_AMQP_URL": amqp_url, "CHIFFON_RELAY_NAME": "test"},
                stderr=output,
            )
        try:
            yield running
        finally:
            if running.returncode is None:
                running.terminate()
                await running.wait()

    async with orchestrating(amqp_url, database_url):
        agents = [
            BaseAgent(url, interval_seconds=0.5, resources=NoResources(), pool_name="lab")
            for _ in range(20)
        ]

        async def all_beat(times: int) -> bool:
            return all(agent.heartbeats_confirmed >= times for agent in agents)

        async with process() as first:
            async with asyncio.TaskGroup() as group:
                for agent in agents:
                    group.create_task(agent.__aenter__())
            await until(lambda: all_beat(3), "three heartbeats of each")
            first.send_signal(signal.SIGKILL)
            await first.wait()
            confirmed = [agent.heartbeats_confirmed for agent in agents]
        async with process():
            more = max(confirmed) + 3
            await until(lambda: all_beat(more), "three more of each, over the next relay")
            rows = [await registry.show(agent.identity.agent_id) for agent in agents]
            async with asyncio.TaskGroup() as group:
                for agent in agents:
                    group.create_task(agent.__aexit__())

        async def all_left() -> bool:
            found = [await registry.show(agent.identity.agent_id) for agent in agents]
            return all(one is not None and one.status_reason == "farewell" for one in found)

        await until(all_left, "the farewell of each")

    assert all(agent._link.connections_made >= 2 for agent in agents)
    assert all(row is not None and row.status == "online" for row in rows)
