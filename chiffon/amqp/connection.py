"""One AMQP connection: opening it, its channels, and noticing that it is lost.

Channels are those of aiormq, one layer below aio-pika: two tasks and an object less a message.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

import aio_pika
import aiormq
from aiormq.abc import AbstractChannel
from yarl import URL

from chiffon.amqp.translation import cancellable, describe, translated
from chiffon.amqp.url import host_and_port, hosts
from chiffon.errors import BusRefused, BusUnavailable

DIAL_SECONDS = 3.0
DIAL_LIMIT_SECONDS = 20.0
"""For all steps of a dial, over a network on which each takes its time."""

CLOSE_SECONDS = 3.0

HEARTBEAT_SECONDS = 5
"""AMQP heartbeat. aiormq sees a dead peer only after three times (this + 1): 18 s here."""

Channel = AbstractChannel


class AnyConnection:
    """A connection to the broker that is open until it is lost, once and for one reason.

    Args:
        where: Host and port, for people.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.on_lost: Callable[[], None] = lambda: None
        self.reset_back_off: Callable[[], None] = lambda: None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def drop(self, reason: str) -> None:
        """Give this connection up; its ``ReconnectingConnection`` closes it and dials again."""
        if not self.lost.done():
            self.lost.set_result(reason)
            self.on_lost()

    async def close(self) -> None:
        """Close the connection; a peer that does not answer is left to itself after 3 s."""
        raise NotImplementedError


class Connection(AnyConnection):
    """A connection for whatever the library can do. Made by ``dial``."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection, where: str) -> None:
        super().__init__(where)
        self._connection = connection
        self._discarded: set[Channel] = set()
        connection.close_callbacks.add(self._on_close)

    def _on_close(self, _: Any, error: BaseException | None) -> None:
        self.drop(describe(error))

    @property
    def is_blocked(self) -> bool:
        """Whether the broker has said that an alarm stops publishers (``connection.blocked``)."""
        transport = self._connection.transport
        if transport is None:
            return False
        # The library offers a coroutine to wait with, and no flag: it suspends if blocked.
        waiting = transport.connection.ready()
        try:
            waiting.send(None)
        except StopIteration:
            return False
        waiting.close()
        return True

    async def unblocked(self) -> None:
        """Wait until publishers may publish again, or the connection is lost."""
        transport = self._connection.transport
        if transport is None:
            return
        ready: asyncio.Future[Any] = asyncio.ensure_future(transport.connection.ready())
        try:
            await asyncio.wait({ready, self.lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()

    async def channel(self, *, confirms: bool = True, prefetch: int = 0) -> Channel:
        """Open a channel; when it closes for any reason, the connection is lost.

        Args:
            confirms: Whether ``publish`` on it waits for the broker's confirm.
            prefetch: How many deliveries may be unacknowledged; 0 means no limit.

        Raises:
            BusUnavailable: The connection is gone.
        """
        with translated("opening a channel"):
            transport = self._connection.transport
            if transport is None:
                raise BusUnavailable("the connection is closed")
            channel = await transport.connection.channel(
                publisher_confirms=confirms, on_return_raises=True, timeout=DIAL_SECONDS
            )
            channel.closing.add_done_callback(partial(self._on_channel_close, channel))
            if prefetch:
                await channel.basic_qos(prefetch_count=prefetch)
        return channel

    async def discard(self, channel: Channel) -> None:
        """Close a channel that has done its work; the connection stays.

        Raises:
            BusUnavailable: The connection is gone.
        """
        self._discarded.add(channel)
        with translated("closing a channel"):
            async with asyncio.timeout(CLOSE_SECONDS):
                await channel.close()

    def _on_channel_close(self, channel: Channel, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        if channel in self._discarded:
            self._discarded.discard(channel)
        else:
            self.drop(describe(error))

    async def close(self) -> None:  # noqa: D102
        self.drop("closed by us")
        # The library shrugs off one cancellation, so it is not waited for with a timeout.
        closing = asyncio.ensure_future(self._connection.close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)


async def dial(url: str, name: str) -> Connection:
    """Open one connection to one host.

    Args:
        url: A URL with one host; see ``hosts``.
        name: Shown as the connection's name in the management UI.

    Raises:
        BusRefused: Wrong user or password.
        BusUnavailable: Nothing answers there within 3 s, what answers is not a broker, or it does
            not open the virtual host.
    """
    parts, where = urlsplit(url), host_and_port(url)
    target = url if "heartbeat=" in parts.query else _with_query(url, HEARTBEAT_SECONDS)
    # `aio_pika.connect` would leave a half-open connection to the garbage collector.
    connection = aio_pika.Connection(URL(target), client_properties={"connection_name": name})
    try:
        with cancellable(), _translated_dial(parts, where):
            # The library's timeout is for each step but the last, which waits for as long as the
            # broker says that it is blocked.
            async with asyncio.timeout(DIAL_LIMIT_SECONDS):
                await connection.connect(timeout=DIAL_SECONDS)
    except BaseException:
        await connection.close()
        raise
    return Connection(connection, where)


@contextmanager
def _translated_dial(parts: SplitResult, where: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise BusUnavailable(f"no answer from {where} within {DIAL_SECONDS:g} s") from None
    except (aiormq.exceptions.AuthenticationError, aiormq.exceptions.ProbableAuthenticationError):
        user = parts.username or "guest"
        raise BusRefused(f"the broker at {where} refused user {user!r}: wrong password?") from None
    except aiormq.exceptions.InvalidFrameError:
        # How the library reports the broker's "no" to a virtual host: as a frame out of place,
        # without the reason. It may be passing (starting, a limit), so it is no refusal.
        vhost = parts.path.removeprefix("/") or "/"
        raise BusUnavailable(
            f"the broker at {where} would not open virtual host {vhost!r}: there is none, or none "
            "for this user, or the broker is not ready"
        ) from None
    except OSError as error:
        raise BusUnavailable(f"cannot reach the broker at {where}: {describe(error)}") from None
    except Exception as error:
        raise BusUnavailable(f"no AMQP broker at {where}: {describe(error)}") from error


async def dial_any(url: str, name: str) -> Connection:
    """Open one connection to the first host of ``url`` that lets us in.

    Raises:
        BusRefused: A host refused, and none let us in.
        BusUnavailable: No host could be reached.
    """
    troubles: list[BusUnavailable] = []
    for one in hosts(url):
        try:
            return await dial(one, name)
        except BusUnavailable as error:
            troubles.append(error)
    refusals = [trouble for trouble in troubles if isinstance(trouble, BusRefused)]
    raise (refusals or troubles)[0]


def _with_query(url: str, heartbeat: int) -> str:
    return f"{url}{'&' if urlsplit(url).query else '?'}heartbeat={heartbeat}"
