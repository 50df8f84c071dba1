"""The AMQP side: connections that are kept alive, confirmed publishing, and the topology.

A ``Link`` keeps one connection: it dials the hosts in turn with full jitter, prepares what its
owner needs on each new connection, and drops it whole at the first sign of trouble, an error on
any of its channels included. The robust mode of aio-pika is not used: it knows one host, a fixed
pause, and has left consumers dead on a connection that said it was open.

Channels are those of aiormq, one layer below aio-pika: two tasks and an object less a message.
"""

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

import aio_pika
import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from yarl import URL

from chiffon import liveness
from chiffon.errors import (
    BadConfiguration,
    BusRefused,
    BusUnavailable,
    TopologyMismatch,
    TopologyMissing,
    Unroutable,
    masked,
)

log = logging.getLogger(__name__)

DIAL_SECONDS = 3.0
CLOSE_SECONDS = 3.0

HEARTBEAT_SECONDS = 5
"""AMQP heartbeat. aiormq sees a dead peer only after three times (this + 1): 18 s here."""

Properties = Basic.Properties
Channel = AbstractChannel
Prepare = Callable[["Session"], Awaitable[None]]


def hosts(url: str) -> list[str]:
    """Return one URL for each host that ``url`` names.

    Args:
        url: ``amqp://user:password@host:5672,other:5672/vhost``, or whole URLs separated by
            commas. ``amqps`` for TLS; its files go into the query (``cafile``, ``certfile``,
            ``keyfile``).

    Raises:
        BadConfiguration: It is not such a URL.
    """
    urls: list[str] = []
    for part in re.split(r",(?=amqps?://)", url.strip()):
        match = re.fullmatch(r"(amqps?://)((?:[^/]*@)?)([^/?@]+)([/?].*)?", part)
        if not match:
            raise BadConfiguration(
                "CHIFFON_AMQP_URL: not an AMQP URL; it looks like amqp://user:password@host/vhost"
            )
        scheme, credentials, names, rest = match.groups()
        urls += [f"{scheme}{credentials}{name}{rest or '/'}" for name in names.split(",")]
    for one in urls:
        try:
            has_host = bool(urlsplit(one).hostname) and urlsplit(one).port != 0
        except ValueError:
            has_host = False
        if not has_host:
            raise BadConfiguration(
                "CHIFFON_AMQP_URL: no host, or a bad port; in a user name or password, "
                "/ is written %2F, @ %40 and : %3A"
            )
    return urls


class Session:
    """One open connection, until it is lost. Made by ``dial``."""

    def __init__(self, connection: aio_pika.abc.AbstractConnection, where: str) -> None:
        self.where = where
        self.on_lost: Callable[[], None] = lambda: None
        self.works: Callable[[], None] = lambda: None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._discarded: set[Channel] = set()
        connection.close_callbacks.add(self._on_close)

    def _on_close(self, _: Any, error: BaseException | None) -> None:
        self.drop(_describe(error))

    def drop(self, reason: str) -> None:
        """Give this connection up; its ``Link`` closes it and dials again."""
        if not self.lost.done():
            self.lost.set_result(reason)
            self.on_lost()

    @property
    def is_blocked(self) -> bool:
        """Whether the broker told us that an alarm stops publishers (``connection.blocked``)."""
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
        """Open a channel; when it closes for any reason, the session is lost.

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
        """Close a channel that has done its work; the session stays.

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
            self.drop(_describe(error))

    async def close(self) -> None:
        """Close the connection; a peer that does not answer is left to itself after 3 s."""
        self.drop("closed by us")
        # The library shrugs off one cancellation, so it is not waited for with a timeout.
        closing = asyncio.ensure_future(self._connection.close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)


async def dial(url: str, name: str) -> Session:
    """Open one connection to one host.

    Args:
        url: A URL with one host; see ``hosts``.
        name: Shown as the connection's name in the management UI.

    Raises:
        BusRefused: Wrong user or password.
        BusUnavailable: Nothing answers there within 3 s, what answers is not a broker, or it does
            not open the virtual host.
    """
    parts = urlsplit(url)
    where = f"{parts.hostname}:{parts.port or (5671 if parts.scheme == 'amqps' else 5672)}"
    target = url if "heartbeat=" in parts.query else _with_query(url, HEARTBEAT_SECONDS)
    # `aio_pika.connect` would leave a half-open connection to the garbage collector.
    connection = aio_pika.Connection(URL(target), client_properties={"connection_name": name})
    try:
        with _translated_dial(parts, where):
            await connection.connect(timeout=DIAL_SECONDS)
    except BaseException:
        await connection.close()
        raise
    return Session(connection, where)


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
        # How the library tells of the broker's "no" to a virtual host: as a frame out of place,
        # without the reason. It may be passing (starting, a limit), so it is no refusal.
        vhost = parts.path.removeprefix("/") or "/"
        raise BusUnavailable(
            f"the broker at {where} would not open virtual host {vhost!r}: there is none, or none "
            "for this user, or the broker is not ready"
        ) from None
    except OSError as error:
        raise BusUnavailable(f"cannot reach the broker at {where}: {_describe(error)}") from None
    except Exception as error:
        raise BusUnavailable(f"no AMQP broker at {where}: {_describe(error)}") from error


async def dial_any(url: str, name: str) -> Session:
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


class Link:
    """One AMQP connection that is kept alive for as long as the context is open.

    Args:
        url: One or several hosts; see ``hosts``.
        name: Shown as the connection's name in the management UI.
        prepare: Run on each new connection before anyone else gets it: declares, consumes.
        redial_cap_seconds: The longest pause between two dials.
        stop_if_refused: Whether a broker that refuses us before we were ever let in ends the
            link with ``BusRefused``. Later refusals never do: somebody is mending the broker.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        prepare: Prepare | None = None,
        redial_cap_seconds: float = 5.0,
        stop_if_refused: bool = False,
    ) -> None:
        self.trouble = "not connected yet"
        self._urls = hosts(url)
        self._name = name
        self._prepare = prepare
        self._cap = redial_cap_seconds
        self._stop_if_refused = stop_if_refused
        self._attempt = 0
        self._last_error: BusUnavailable | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[Session]
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(), name=f"link {self._name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError, BusRefused):
            await self._task
        if self._closing:
            await asyncio.wait(self._closing)
        self._ready.cancel()

    async def session(self) -> Session:
        """Return the live session, waiting for one as long as it takes.

        Raises:
            BusRefused: The broker refused us and the link was made with ``stop_if_refused``.
        """
        return await asyncio.shield(self._ready)

    @property
    def current(self) -> Session | None:
        """The live session, ``None`` while there is none."""
        is_up = self._ready.done() and not self._ready.cancelled() and not self._ready.exception()
        return self._ready.result() if is_up else None

    @property
    def lacks_topology(self) -> bool:
        """Whether the broker lets us in, and what we need is not on it yet."""
        return isinstance(self._last_error, TopologyMissing)

    def works(self) -> None:
        """Say that the connection did its work, so that the next redial is quick again.

        A connection alone is no proof: a broker that takes connections and drops them would
        otherwise be dialled twice a second by the whole fleet.
        """
        self._attempt = 0

    async def _supervise(self) -> None:
        first = random.randrange(len(self._urls))
        while True:
            url = self._urls[(first + self._attempt) % len(self._urls)]
            session = await self._dial_and_prepare(url)
            if session is not None:
                try:
                    await self._serve(session)
                finally:
                    self._close_aside(session)
            delay = liveness.redial_delay(self._attempt, self._cap, random.random())
            self._attempt += 1
            await asyncio.sleep(delay)

    async def _serve(self, session: Session) -> None:
        """Hand the session out until it is lost."""
        self._stop_if_refused = False
        self._last_error = None
        self.trouble = f"the broker at {session.where} does not answer"
        if not session.lost.done():
            session.on_lost = self._renew
            self._ready.set_result(session)
            log.info("connected to the broker at %s (%s)", session.where, self._name)
        self.trouble = await asyncio.shield(session.lost)
        log.warning("lost the broker at %s: %s", session.where, self.trouble)

    def _close_aside(self, session: Session) -> None:
        # A dead peer takes seconds to close, which the next dial need not wait for.
        session.drop("closed by us")
        closing = asyncio.create_task(session.close(), name=f"closing {self._name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _renew(self) -> None:
        # At the moment of the loss, so that nobody is handed the session that was just lost.
        self._ready = asyncio.get_running_loop().create_future()

    async def _dial_and_prepare(self, url: str) -> Session | None:
        session: Session | None = None
        try:
            with translated("dialling"):
                session = await dial(url, self._name)
                session.works = self.works
                if self._prepare is not None:
                    await self._prepare(session)
        except Exception as error:
            if session is not None:
                self._close_aside(session)
            if not isinstance(error, BusUnavailable):
                # A bug must not end the only task that would dial again.
                log.exception("preparing the connection failed")
                error = BusUnavailable(f"preparing the connection failed: {error!r}")
            self._report(error)
            if self._stop_if_refused and isinstance(error, BusRefused):
                self._ready.set_exception(error)
                self._ready.exception()  # seen here, so that nobody has to ask for it
                raise
            return None
        except BaseException:
            if session is not None:
                self._close_aside(session)
            raise
        return session

    def _report(self, error: BusUnavailable) -> None:
        # The same trouble at every dial is told once, and again after each doubling of the pause.
        if str(error) != self.trouble or self._attempt & (self._attempt - 1) == 0:
            log.warning("%s; trying again", error)
        self.trouble = str(error)
        self._last_error = error


class Publisher:
    """Publishes on whatever session a link has now, on a channel of its own.

    A session on which a confirm does not come in time is taken for dead and dropped, unless the
    broker has said that an alarm blocks it: the library would notice only after 18 s.

    Args:
        link: The connection.
        confirms: Whether to wait for the broker's confirm.
    """

    def __init__(self, link: Link, *, confirms: bool = True) -> None:
        self._link = link
        self._confirms = confirms
        self._open: tuple[Session, Channel] | None = None
        self._opening = asyncio.Lock()

    async def publish(
        self,
        body: bytes,
        *,
        exchange: str,
        routing_key: str,
        properties: Properties,
        timeout: float,
        mandatory: bool = True,
    ) -> None:
        """Do what ``publish`` does; ``timeout`` includes waiting for the connection.

        Raises:
            BusUnavailable: As ``publish``, or no connection came in time.
        """
        try:
            async with asyncio.timeout(timeout):
                await publish(
                    await self._channel(),
                    body,
                    exchange=exchange,
                    routing_key=routing_key,
                    properties=properties,
                    timeout=timeout,
                    mandatory=mandatory,
                )
        except Unroutable:
            raise
        except TimeoutError:
            trouble = f"not published in {timeout:g} s: {self._link.trouble}"
            self._suspect(trouble)
            raise BusUnavailable(trouble) from None
        except BusUnavailable as error:
            self._suspect(str(error))
            raise

    def _suspect(self, trouble: str) -> None:
        session = self._link.current
        if self._confirms and session is not None and not session.is_blocked:
            session.drop(trouble)

    async def _channel(self) -> Channel:
        async with self._opening:
            session = await self._link.session()
            if self._open is None or self._open[0] is not session:
                self._open = (session, await session.channel(confirms=self._confirms))
            return self._open[1]


async def publish(
    channel: Channel,
    body: bytes,
    *,
    exchange: str,
    routing_key: str,
    properties: Properties,
    timeout: float,
    mandatory: bool = True,
) -> None:
    """Publish one message, and on a channel with confirms wait for the broker's confirm.

    Args:
        channel: From ``Session.channel``.
        body: The body, encoded.
        exchange: Its name; empty for the default exchange.
        routing_key: At most 255 bytes.
        properties: AMQP properties. Leave ``message_id`` empty: the library matches returned
            messages by it and fills in a fresh one.
        timeout: Seconds to wait, above zero. After it the message may still arrive.
        mandatory: Whether a message that no queue takes is an error.

    Raises:
        Unroutable: Confirmed, and no queue took it.
        TopologyMissing: There is no such exchange. The session is lost.
        BusUnavailable: Not confirmed in time, refused, or the connection broke.
    """
    with translated(f"publishing to {exchange or 'a reply queue'}"):
        await channel.basic_publish(
            body,
            exchange=exchange,
            routing_key=routing_key,
            properties=properties,
            mandatory=mandatory,
            timeout=timeout,
        )


async def acknowledge(message: DeliveredMessage, *, multiple: bool = False) -> None:
    """Acknowledge a delivery, and with ``multiple`` all before it on its channel.

    Raises:
        BusUnavailable: Its connection is gone: the broker delivers it again.
    """
    with translated("acknowledging"):
        # On a dying connection the library's queue is full and nobody empties it any more.
        async with asyncio.timeout(CLOSE_SECONDS):
            await message.channel.basic_ack(_tag(message), multiple=multiple)


async def reject(message: DeliveredMessage) -> None:
    """Give a delivery back for good: the broker sets it aside.

    Raises:
        BusUnavailable: Its connection is gone: the broker delivers it again.
    """
    with translated("rejecting"):
        async with asyncio.timeout(CLOSE_SECONDS):
            await message.channel.basic_reject(_tag(message), requeue=False)


def _tag(message: DeliveredMessage) -> int:
    if message.delivery_tag is None:
        raise ValueError("not a delivery of a consumer")
    return message.delivery_tag


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn what the AMQP library raises inside the block into chiffon's exceptions.

    A ``CancelledError`` that nobody asked for is one of them: when a connection dies, aiormq
    raises it from a publish in flight, and a loop that lets it pass would end silently.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise BusUnavailable(f"{doing}: the connection broke") from None
    except TimeoutError:
        raise BusUnavailable(f"{doing}: not confirmed in time") from None
    except aiormq.exceptions.PublishError as error:
        reason = getattr(error.frame, "reply_text", None) or "NO_ROUTE"
        raise Unroutable(f"{doing}: no queue is bound for it ({reason})") from None
    except (aiormq.exceptions.AMQPError, OSError, RuntimeError) as error:
        ours = _TRANSLATIONS.get(type(error), BusUnavailable)
        raise ours(f"{doing}: {_describe(error)}") from None
    except Exception as error:
        # A connection that ends between two frames: the library raises a bare Exception.
        if type(error) is not Exception:
            raise
        raise BusUnavailable(f"{doing}: the connection broke") from None


_TRANSLATIONS: dict[type[BaseException], type[BusUnavailable]] = {
    aiormq.exceptions.ChannelNotFoundEntity: TopologyMissing,
    aiormq.exceptions.ChannelAccessRefused: BusRefused,
    aiormq.exceptions.ChannelPreconditionFailed: TopologyMismatch,
}


def _with_query(url: str, heartbeat: int) -> str:
    return f"{url}{'&' if urlsplit(url).query else '?'}heartbeat={heartbeat}"


def _describe(error: BaseException | None) -> str:
    """Return one line for people; library exceptions keep theirs in ``args``."""
    if error is None or isinstance(error, asyncio.CancelledError):
        return "the connection was closed"
    words = [str(arg) for arg in error.args if arg is not None]
    return masked(" ".join(words) or type(error).__name__)
