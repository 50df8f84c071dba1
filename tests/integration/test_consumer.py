"""The connection that consumes heartbeats, on a real broker: what it takes, and how it ends."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chiffon.amqp import consumer
from chiffon.amqp.consumer import Consumer
from chiffon.amqp.frames import Delivery
from chiffon.errors import BusRefused, BusUnavailable, TopologyMissing
from tests.fixtures import plain
from tests.fixtures.proxy import Proxy
from tests.fixtures.servers import Management
from tests.fixtures.waiting import until

QUEUE = "chiffon.ingest"


class Taken:
    """What a consumer was given."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []

    def __call__(self, deliveries: list[Delivery], received: float) -> None:
        self.deliveries += deliveries

    async def count(self, wanted: int) -> list[Delivery]:
        async def are_here() -> bool:
            return len(self.deliveries) >= wanted

        await until(are_here, f"{wanted} deliveries")
        return self.deliveries


@asynccontextmanager
async def consuming(url: str, taken: Taken, prefetch: int = 100) -> AsyncIterator[Consumer]:
    made = await consumer.dial(url, "test consumes")
    try:
        await made.consume(QUEUE, prefetch=prefetch, on_deliveries=taken)
        yield made
    finally:
        await made.close()


@pytest.fixture
async def queue(amqp_url: str) -> str:
    """The URL of a virtual host with an empty classic queue that the exchange `amq.topic` feeds."""
    async with plain.channel(amqp_url) as to:
        declared = await to.declare_queue(QUEUE, durable=True)
        await declared.bind("amq.topic", "#")
    return amqp_url


async def send(url: str, *bodies: bytes) -> None:
    async with plain.channel(url) as to:
        for body in bodies:
            await plain.publish(to, "amq.topic", "some.key", body, "some.type")


async def test_deliveries_come_whole_and_in_order_whatever_their_size(queue: str) -> None:
    bodies = [b"", b"small", b"x" * 131_064, b"y" * 131_065, b"z" * 1_000_003, b"last"]
    taken = Taken()
    async with consuming(queue, taken):
        await send(queue, *bodies)
        deliveries = await taken.count(len(bodies))

    assert [one.body for one in deliveries] == bodies
    assert [one.tag for one in deliveries] == list(range(1, len(bodies) + 1))
    assert {(one.exchange, one.routing_key) for one in deliveries} == {("amq.topic", "some.key")}
    assert {one.header.properties.message_type for one in deliveries} == {"some.type"}


async def test_what_is_acknowledged_is_gone_and_the_rest_comes_again(queue: str) -> None:
    await send(queue, b"1", b"2", b"3", b"4")
    taken = Taken()
    async with consuming(queue, taken) as made:
        await taken.count(4)
        made.acknowledge(2)
        made.reject(4)
    again = Taken()
    async with consuming(queue, again):
        await again.count(1)

    assert [one.body for one in again.deliveries] == [b"3"]


async def test_no_more_is_delivered_than_may_be_unacknowledged(queue: str) -> None:
    await send(queue, *(b"%d" % number for number in range(10)))
    taken = Taken()
    async with consuming(queue, taken, prefetch=3) as made:
        await taken.count(3)
        made.acknowledge(3)
        await taken.count(6)

    assert [one.body for one in taken.deliveries] == [b"%d" % number for number in range(6)]


async def test_a_cancelled_consumer_is_given_nothing_more(queue: str) -> None:
    taken = Taken()
    async with consuming(queue, taken) as made:
        await made.cancel()
        await send(queue, b"later")
        assert await plain.depth(queue, QUEUE) == (1, 0)

    assert taken.deliveries == []


async def test_a_deleted_queue_a_cut_connection_and_a_closed_channel_each_lose_it_with_the_reason(
    queue: str, management: Management
) -> None:
    """The consumer connects anew after each."""
    async with consuming(queue, Taken()) as made:
        made.acknowledge(99)
        assert "PRECONDITION_FAILED" in await asyncio.wait_for(made.lost, 10)
    async with consuming(queue, Taken()) as made:
        await plain.cut(management, queue, "test consumes")
        assert "CONNECTION_FORCED" in await asyncio.wait_for(made.lost, 10)
    async with consuming(queue, Taken()) as made:
        management.call("DELETE", f"queues/{urlsplit(queue).path[1:]}/{QUEUE}")
        assert "its queue is gone" in await asyncio.wait_for(made.lost, 10)


async def test_a_broker_that_becomes_silent_is_noticed_after_two_of_its_heartbeats(
    queue: str,
) -> None:
    async with Proxy.to(queue).running() as proxy:
        async with consuming(f"{proxy.url(queue)}?heartbeat=1", Taken()) as made:
            proxy.swallows = True
            assert "is silent for 2 s" in await asyncio.wait_for(made.lost, 10)
        assert proxy.swallowed_bytes, "the fault was not injected"


async def test_a_quiet_connection_stays_open_by_heartbeats(queue: str) -> None:
    """The broker closes a connection that says nothing for two of its heartbeats, 2 s here."""
    taken = Taken()
    async with consuming(f"{queue}?heartbeat=1", taken) as made:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(made.lost), 4)
        await send(queue, b"still here")
        await taken.count(1)


async def test_what_the_taker_raises_loses_the_connection_and_not_the_messages(
    queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(deliveries: list[Delivery], received: float) -> None:
        raise ValueError("a bug")

    made = await consumer.dial(queue, "test consumes")
    await made.consume(QUEUE, prefetch=10, on_deliveries=broken)
    await send(queue, b"one")
    assert "a bug" in await asyncio.wait_for(made.lost, 10)
    await made.close()
    taken = Taken()
    async with consuming(queue, taken):
        await taken.count(1)


async def test_whoever_is_not_let_in_is_told_why(queue: str) -> None:
    parts = urlsplit(queue)
    wrong = parts._replace(netloc=f"{parts.username}:wrong@{parts.hostname}:{parts.port}")
    with pytest.raises(BusRefused, match=r"refused user .*: wrong password") as refused:
        await consumer.dial(wrong.geturl(), "test")
    with pytest.raises(BusUnavailable, match="virtual host 'nowhere'"):
        await consumer.dial(parts._replace(path="/nowhere").geturl(), "test")
    with pytest.raises(BusUnavailable, match="cannot reach the broker"):
        await consumer.dial("amqp://guest:guest@127.0.0.1:1/", "test")
    made = await consumer.dial(queue, "test")
    with pytest.raises(TopologyMissing, match="no queue 'nothing'"):
        await made.consume("nothing", prefetch=1, on_deliveries=Taken())
    await made.close()
    assert ":wrong@" not in str(refused.value)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad\r\n\r\n", b"AMQP\0\0\x09\x01", b""])
async def test_what_is_no_broker_is_told_from_one(
    greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "DIAL_SECONDS", 0.5)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with suppress(OSError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BusUnavailable):
        await consumer.dial(f"amqp://guest:guest@127.0.0.1:{port}/", "test")
    server.close()


@asynccontextmanager
async def encrypted(url: str, certificate: Path) -> AsyncIterator[str]:
    """Provide a URL that leads to the same broker over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "certificate.pem", certificate / "key.pem")
    parts = urlsplit(url)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(parts.hostname, parts.port)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(serve, "localhost", 0, ssl=context, family=2)
    port = server.sockets[0].getsockname()[1]
    login = f"{parts.username}:{parts.password}"
    yield f"amqps://{login}@localhost:{port}{parts.path}"
    server.close()


async def test_it_speaks_tls_and_trusts_only_whom_it_is_told_to(
    queue: str, certificate: Path
) -> None:
    body, taken = b"secret" * 100_000, Taken()
    await send(queue, body)
    async with encrypted(queue, certificate) as url:
        with pytest.raises(BusUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await consumer.dial(url, "test")
        with pytest.raises(BusUnavailable, match="the files for TLS cannot be used"):
            await consumer.dial(f"{url}?cafile=/nowhere.pem", "test")
        trusting = f"{url}?cafile={certificate / 'certificate.pem'}"
        async with consuming(trusting, taken) as made:
            await taken.count(1)
            made.acknowledge(1)

    assert taken.deliveries[0].body == body
