"""A connection that does nothing but consume one queue, in a twentieth of the library's CPU.

The one hot path of chiffon: an orchestrator takes thousands of heartbeats a second, and aiormq
spends 50 to 150 µs on each, two tasks and a pamqp object a frame among them. Here a chunk of bytes
becomes a list of deliveries. It speaks what a consumer needs and no more: one channel, no
publishing. Everything else that is done with the broker is done by the library, in ``connection``.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from pamqp import frame
from pamqp.commands import Basic, Channel
from pamqp.commands import Connection as Amqp

from chiffon.amqp.connection import DIAL_SECONDS, HEARTBEAT_SECONDS, AnyConnection
from chiffon.amqp.frames import (
    CHANNEL,
    MAX_FRAME_BYTES,
    Delivery,
    Method,
    acknowledgement,
    rejection,
)
from chiffon.amqp.transport import Transport
from chiffon.amqp.url import host_and_port
from chiffon.errors import BusRefused, BusUnavailable, TopologyMissing

log = logging.getLogger(__name__)

_GREETING = b"AMQP\x00\x00\x09\x01"
_CAPABILITIES = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
}
_ACCESS_REFUSED, _NOT_FOUND = 403, 404

OnDeliveries = Callable[[list[Delivery], float], None]
Answer = TypeVar("Answer")


class Consumer(AnyConnection, Transport):
    """A connection that consumes. Made by ``dial``."""

    def __init__(self, where: str) -> None:
        AnyConnection.__init__(self, where)
        Transport.__init__(self, f"the broker at {where}")
        self._answer: asyncio.Future[Any] | None = None
        self._asking = asyncio.Lock()
        self._refusal: BusUnavailable | None = None
        self._on_deliveries: OnDeliveries | None = None
        self._tag = ""

    async def consume(self, queue: str, *, prefetch: int, on_deliveries: OnDeliveries) -> None:
        """Start to consume; a connection does so once.

        Args:
            queue: Its name.
            prefetch: How many deliveries may be unacknowledged, 1 to 65,535.
            on_deliveries: Called with what came, and when: seconds of the monotonic clock. It runs
                in the event loop and must not wait. What it raises ends the connection.

        Raises:
            TopologyMissing: There is no such queue.
            BusRefused: We may not read it.
            BusUnavailable: The connection is gone, or does not answer within 3 s.
        """
        self._on_deliveries = on_deliveries
        await self._ask(Basic.Qos(prefetch_count=prefetch), Basic.QosOk)
        answer = await self._ask(Basic.Consume(queue=queue), Basic.ConsumeOk)
        self._tag = answer.consumer_tag or ""

    async def cancel(self) -> None:
        """Stop deliveries; what is not acknowledged yet may still be.

        Raises:
            BusUnavailable: The connection is gone, or does not answer within 3 s.
        """
        await self._ask(Basic.Cancel(consumer_tag=self._tag), Basic.CancelOk)

    def acknowledge(self, tag: int) -> None:
        """Acknowledge a delivery and all before it.

        On a connection that is gone nothing is done: the broker delivers them again.
        """
        self.write(acknowledgement(tag))

    def reject(self, tag: int) -> None:
        """Reject one delivery for good: the broker dead-letters it."""
        self.write(rejection(tag))

    async def close(self) -> None:  # noqa: D102
        self.drop("closed by us")
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BusUnavailable("the connection was closed by us"))
        try:
            await self._ask(Amqp.Close(200, "", 0, 0), Amqp.CloseOk, channel=0)
        except BusUnavailable as error:
            log.debug("%s", error)
        finally:
            self.abort()

    def abort(self) -> None:  # noqa: D102
        self.drop("closed by us")
        super().abort()

    def drop(self, reason: str) -> None:  # noqa: D102
        self.stop_heartbeats()
        super().drop(reason)

    def on_deliveries(self, deliveries: list[Delivery], received: float) -> None:  # noqa: D102
        if self._on_deliveries is not None and not self.lost.done():
            self._on_deliveries(deliveries, received)

    def on_method(self, method: Method) -> None:  # noqa: D102
        came = method.frame
        if isinstance(came, Amqp.Close):
            self.write(frame.marshal(Amqp.CloseOk(), 0))
            self.fail(self._refused(came.reply_code, came.reply_text))
        elif isinstance(came, Channel.Close):
            self.write(frame.marshal(Channel.CloseOk(), CHANNEL))
            self.fail(self._refused(came.reply_code, came.reply_text))
        elif isinstance(came, Basic.Cancel):
            self.fail(BusUnavailable("the broker cancelled the consumer: its queue is gone"))
        elif isinstance(came, Amqp.Blocked | Amqp.Unblocked):
            log.debug("an alarm stops publishers, or no more: acknowledgements are read as before")
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(came)
        else:
            log.debug("not asked for: %s", type(came).__name__)

    def fail(self, error: BusUnavailable) -> None:  # noqa: D102
        self._refusal = self._refusal or error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._refusal)
        self.drop(str(error))

    def _refused(self, code: int | None, text: str | None) -> BusUnavailable:
        kinds = {_ACCESS_REFUSED: BusRefused, _NOT_FOUND: TopologyMissing}
        return kinds.get(code or 0, BusUnavailable)(
            f"the broker at {self.where} says {text} ({code})"
        )

    async def _ask(self, method: Any, answer: type[Answer], *, channel: int = CHANNEL) -> Answer:
        """Send a method and wait for its answer; one is asked at a time."""
        async with self._asking:
            return await self._receive(answer, frame.marshal(method, channel))

    async def _receive(self, kind: type[Answer], after: bytes) -> Answer:
        transport = self._transport
        if transport is None or transport.is_closing() or self._refusal is not None:
            raise self._refusal or BusUnavailable("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self.write(after)
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                got = await self._answer
        except TimeoutError:
            raise BusUnavailable(f"no answer from {self.where} within {DIAL_SECONDS:g} s") from None
        finally:
            self._answer = None
        if not isinstance(got, kind):
            raise BusUnavailable(
                f"no AMQP broker at {self.where}: {type(got).__name__} instead of {kind.__name__}"
            )
        return got

    async def open(self, parts: SplitResult, name: str) -> None:
        """Shake hands: log in, agree on the heartbeat, open the virtual host and the channel."""
        query = parse_qs(parts.query)
        start = await self._receive(Amqp.Start, _GREETING)
        mechanism = query.get("auth", ["plain"])[0].upper()
        if mechanism not in (start.mechanisms or "").split():
            raise BusRefused(f"the broker at {self.where} does not take {mechanism} logins")
        user, password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        login = "" if mechanism == "EXTERNAL" else f"\0{user}\0{password}"
        properties: dict[str, Any] = {
            "product": "chiffon",
            "connection_name": name,
            "capabilities": _CAPABILITIES,
        }
        try:
            tune = await self._ask(
                Amqp.StartOk(properties, mechanism, login, "en_US"), Amqp.Tune, channel=0
            )
        except BusRefused:
            raise BusRefused(
                f"the broker at {self.where} refused user {user!r}: wrong password?"
            ) from None
        largest = min(tune.frame_max or MAX_FRAME_BYTES, MAX_FRAME_BYTES)
        self._frames.max_frame_bytes = largest
        seconds = int(query.get("heartbeat", [str(HEARTBEAT_SECONDS)])[0])
        self.write(frame.marshal(Amqp.TuneOk(CHANNEL, largest, seconds), 0))
        self.exchange_heartbeats(seconds)
        vhost = unquote(parts.path.removeprefix("/")) or "/"
        try:
            await self._ask(Amqp.Open(vhost), Amqp.OpenOk, channel=0)
        except BusUnavailable as error:
            # It may be passing (starting, a limit), so it is no refusal.
            raise BusUnavailable(
                f"the broker at {self.where} would not open virtual host {vhost!r}: {error}"
            ) from None
        await self._ask(Channel.Open(), Channel.OpenOk)


async def dial(url: str, name: str) -> Consumer:
    """Open a connection to one host.

    Args:
        url: A URL with one host; see ``url.hosts``.
        name: Shown as the connection's name in the management UI.

    Raises:
        BusRefused: Wrong user or password.
        BusUnavailable: Nothing answers there within 3 s, what answers is not a broker, or it does
            not open the virtual host.
    """
    parts, where = urlsplit(url), host_and_port(url)
    consumer = Consumer(where)
    try:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                context = await _tls(parts)
                await asyncio.get_running_loop().create_connection(
                    lambda: consumer,
                    parts.hostname or "",
                    int(where.rpartition(":")[2]),
                    ssl=context,
                )
                await consumer.open(parts, name)
        except TimeoutError:
            raise BusUnavailable(f"no answer from {where} within {DIAL_SECONDS:g} s") from None
        except OSError as error:
            raise BusUnavailable(f"cannot reach the broker at {where}: {error}") from None
    except BaseException:
        consumer.abort()
        raise
    return consumer


async def _tls(parts: SplitResult) -> ssl.SSLContext | None:
    """Return how TLS is done, by the query of the URL: the names are those of aiormq."""
    if parts.scheme != "amqps":
        return None
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}

    def load() -> ssl.SSLContext:
        context = ssl.create_default_context(
            cafile=query.get("cafile"), capath=query.get("capath"), cadata=query.get("cadata")
        )
        if "certfile" in query:
            context.load_cert_chain(query["certfile"], query.get("keyfile"))
        if query.get("no_verify_ssl", "0") != "0":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    try:
        return await asyncio.to_thread(load)
    except OSError as error:
        raise BusUnavailable(f"the files for TLS cannot be used: {error}") from None
