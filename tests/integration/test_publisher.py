"""Publishing through a line that swallows everything."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from chiffon.amqp.connection import Connection
from chiffon.amqp.publisher import Properties, Publisher
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.errors import BusUnavailable
from tests.fixtures.proxy import Proxy

TIMEOUT = 1.0


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[Proxy]:
    async with Proxy.to(amqp_url).running() as made:
        yield made


async def publish(publisher: Publisher) -> None:
    await publisher.publish(
        b"{}",
        exchange="chiffon.heartbeats",
        routing_key="heartbeat.a.b.c",
        properties=Properties(expiration="0"),
        timeout=TIMEOUT,
    )


async def test_a_connection_that_confirms_nothing_in_time_is_given_up(
    amqp_url: str, broker: str, proxy: Proxy
) -> None:
    async with ReconnectingConnection(proxy.url(amqp_url), name="test") as link:
        publisher = Publisher(link)
        await publish(publisher)
        connection = await link.connection()
        proxy.swallows = True
        with pytest.raises(BusUnavailable, match="not published in 1 s"):
            await publish(publisher)
        proxy.swallows = False

    assert connection.lost.done()


async def test_who_waited_for_the_connection_does_not_take_the_new_one_down(
    amqp_url: str, broker: str, proxy: Proxy
) -> None:
    """Many publishers share a line: those of the lost one must not lose the next one as well."""
    dialled = asyncio.Event()

    async def slow(_: Connection) -> None:
        dialled.set()
        await asyncio.sleep(0.8 * TIMEOUT)

    async with ReconnectingConnection(proxy.url(amqp_url), name="test", prepare=slow) as link:
        await dialled.wait()
        waiting = asyncio.create_task(publish(Publisher(link)))
        connection = await link.connection()
        proxy.swallows = True
        with pytest.raises(BusUnavailable):
            await waiting
        assert proxy.swallowed_bytes > 0
        assert link.current is connection
        proxy.swallows = False


async def test_a_link_ends_whatever_it_does_at_that_moment(amqp_url: str, broker: str) -> None:
    """The client library shrugs off a cancellation in the middle of dialling."""
    for step in range(100):
        async with asyncio.timeout(30):
            async with ReconnectingConnection(amqp_url, name="test"):
                await asyncio.sleep(step * 0.0002)
