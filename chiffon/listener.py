"""Where agents dial a relay as if it were the broker: that end of AMQP 0-9-1.

It speaks what a publisher of heartbeats needs: a login, channels, confirms, the look whether the
exchange is there, and publishing to it. Whatever else is asked for is refused in the protocol's
own words, so that a client says what it would say to a broker.
"""

import asyncio
import hmac
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pamqp import frame
from pamqp.commands import Basic, Channel, Confirm, Exchange
from pamqp.commands import Connection as Amqp

from chiffon import __version__
from chiffon.encoding import MAX_ARRAY_BYTES
from chiffon.errors import BadConfiguration, BusUnavailable
from chiffon.frames import (
    MAX_FRAME_BYTES,
    BadFrame,
    Delivery,
    Frames,
    Method,
    acknowledgement,
    refusal,
)
from chiffon.peer import Peer
from chiffon.topology import HEARTBEATS

log = logging.getLogger(__name__)

CHANNELS = 16
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 3.0
HEARTBEAT_SECONDS = 60
"""What we propose; a client that wants its dead line noticed earlier says so."""

UNSETTLED = 1_000
"""Messages of a channel of which nothing is known yet; beyond that nothing more is read."""

UNREAD_BYTES = 1024 * 1024
"""A client that reads nothing, not even its confirms, is cut off."""

_GREETING = b"AMQP\x00\x00\x09\x01"
_OFFER: dict[str, Any] = {
    "product": "chiffon relay",
    "version": __version__,
    "capabilities": {
        "authentication_failure_close": True,
        "basic.nack": True,
        "connection.blocked": True,
        "publisher_confirms": True,
    },
}
_FORCED, _ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED = 320, 403, 404, 406
_FRAME_ERROR, _COMMAND_INVALID, _CHANNEL_ERROR, _NOT_IMPLEMENTED = 501, 503, 504, 540


class Lane:
    """A channel of a client: what was published on it, and how much of that is settled."""

    def __init__(self, guest: "Guest", number: int) -> None:
        self.published = 0
        self._guest = guest
        self._number = number
        self._settled = 0
        self._confirms_after: int | None = None

    def confirm(self) -> None:
        """Answer each message from now on."""
        if self._confirms_after is None:
            self._confirms_after = self.published

    def settle(self, upto: int, *, is_taken: bool) -> None:
        """Answer all messages up to one, by its number on this channel."""
        self._settled = upto
        if self._confirms_after is not None and upto > self._confirms_after:
            answer = acknowledgement if is_taken else refusal
            self._guest.write(answer(upto - self._confirms_after, self._number))
        self._guest.settled()

    @property
    def is_full(self) -> bool:
        """Whether too much is waiting for its answer."""
        return self.published - self._settled >= UNSETTLED


Take = Callable[[Lane, Delivery], None]


class Guest(Peer):
    """A client's connection.

    Args:
        listener: What it dialled.
    """

    def __init__(self, listener: "Listener") -> None:
        frames = Frames(
            range(1, CHANNELS + 1), of_publisher=True, max_body_bytes=2 * MAX_ARRAY_BYTES
        )
        super().__init__(frames, "a client")
        self._listener = listener
        self._greeting: bytes | None = b""
        self._next: type[Any] | None = Amqp.StartOk
        """The method that has to come next; ``None`` once all is agreed."""
        self._lanes: dict[int, Lane] = {}
        self._closing: set[int] = set()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hears_of_blocks = self._is_over = False
        self._deadline: asyncio.TimerHandle | None = None

    def settled(self) -> None:
        """Read on, if what was waiting for its answer has one."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.get_write_buffer_size() > UNREAD_BYTES:
            log.warning("%s reads nothing of what it is told: cut off", self._who)
            self.abort()
        elif not any(one.is_full for one in self._lanes.values()):
            self.resume()

    def tell_blocked(self, reason: str | None) -> None:
        """Ask the client to publish nothing for the time being; with ``None``, to go on."""
        if self._next is None and self._hears_of_blocks:
            method = Amqp.Unblocked() if reason is None else Amqp.Blocked(reason[:200])
            self._send(method)

    def close(self, code: int, text: str, cause: tuple[int, int] = (0, 0)) -> None:
        """Close the connection with a reason, and wait 3 s for the client's word on it."""
        if self._is_over:
            return
        self._is_over = True
        self._lanes.clear()
        self._send(Amqp.Close(code, text[:250], *cause))
        self._limit(CLOSE_SECONDS)

    def fail(self, error: BusUnavailable) -> None:  # noqa: D102
        if isinstance(error, BadFrame):
            log.warning("%s sent %s", self._who, error)
            self.close(_FRAME_ERROR, f"FRAME_ERROR - {error}")
            # What follows cannot be read, its word on this included.
            self._end()
            return
        log.debug("%s: %s", self._who, error)
        self.abort()

    # What follows is for the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        super().connection_made(transport)
        self._who = f"a client at {_place(transport.get_extra_info('peername'))}"
        self._listener.guests.add(self)
        self._limit(HANDSHAKE_SECONDS)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._is_over = True
        self._lanes.clear()
        self._listener.guests.discard(self)
        self.gone.set_result(None)
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._greeting is not None:
            self._greeting += data
            if len(self._greeting) < len(_GREETING):
                return
            greeting, data = self._greeting[: len(_GREETING)], self._greeting[len(_GREETING) :]
            self._greeting = None
            if greeting != _GREETING:
                # So the protocol has it: say what is spoken here.
                self.write(_GREETING)
                self._end()
                return
            self._send(Amqp.Start(0, 9, _OFFER, "PLAIN", "en_US"))
        if data:
            super().data_received(data)

    def on_messages(self, deliveries: list[Delivery], received: float) -> None:  # noqa: D102
        for delivery in deliveries:
            lane = self._lanes.get(delivery.channel)
            if lane is None:
                if not self._is_over and delivery.channel not in self._closing:
                    self.close(_CHANNEL_ERROR, "CHANNEL_ERROR - expected 'channel.open'")
            elif delivery.exchange != HEARTBEATS:
                text = f"NOT_FOUND - a relay has no exchange '{delivery.exchange[:64]}'"
                self._close_lane(delivery.channel, _NOT_FOUND, text, Basic.Publish)
            else:
                lane.published += 1
                self._listener.take(lane, delivery)
                if lane.is_full:
                    self.pause()

    def on_method(self, method: Method) -> None:  # noqa: D102
        came, channel = method.frame, method.channel
        if isinstance(came, Amqp.CloseOk):
            self._end()
        elif self._is_over:
            return
        elif isinstance(came, Amqp.Close):
            self._is_over = True
            self._send(Amqp.CloseOk())
            self._end()
        elif self._next is not None:
            self._agree(came)
        elif channel == 0:
            self._refuse(came)
        elif isinstance(came, Channel.CloseOk):
            self._closing.discard(channel)
        elif channel not in self._closing:
            self._on_channel(channel, came)

    def _agree(self, came: Any) -> None:
        """Take a step of the handshake: log in, agree on the heartbeat, open the virtual host."""
        if not isinstance(came, self._next or ()):
            self.close(_COMMAND_INVALID, f"COMMAND_INVALID - {_name(came)} in the handshake")
        elif isinstance(came, Amqp.StartOk):
            self._log_in(came)
        elif isinstance(came, Amqp.TuneOk):
            if came.frame_max:
                self._frames.max_frame_bytes = min(came.frame_max, MAX_FRAME_BYTES)
            self._next = Amqp.Open
            self.beat(came.heartbeat or 0)
        else:
            # Whichever virtual host it names: ours is that of the relay's own URL.
            self._next = None
            self._limit(None)
            self._send(Amqp.OpenOk())
            if self._listener.blocked is not None:
                self.tell_blocked(self._listener.blocked)

    def _log_in(self, came: Any) -> None:
        properties = came.client_properties or {}
        capabilities = properties.get("capabilities") or {}
        name = properties.get("connection_name")
        if name:
            self._who = f"{str(name)[:64]!r} at {self._who.rpartition(' ')[2]}"
        self._hears_of_blocks = bool(capabilities.get("connection.blocked"))
        if not self._listener.lets_in(came.mechanism, came.response):
            log.warning("refused %s: wrong user or password", self._who)
            if capabilities.get("authentication_failure_close"):
                self.close(
                    _ACCESS_REFUSED,
                    "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.",
                )
            else:
                self._end()
            return
        self._next = Amqp.TuneOk
        self._send(Amqp.Tune(CHANNELS, MAX_FRAME_BYTES, HEARTBEAT_SECONDS))

    def _on_channel(self, number: int, came: Any) -> None:
        lane = self._lanes.get(number)
        if isinstance(came, Channel.Open):
            self._open_lane(number)
        elif lane is None:
            self.close(_CHANNEL_ERROR, "CHANNEL_ERROR - expected 'channel.open'")
        elif isinstance(came, Channel.Close):
            del self._lanes[number]
            self._send(Channel.CloseOk(), number)
        elif isinstance(came, Confirm.Select):
            lane.confirm()
            if not came.nowait:
                self._send(Confirm.SelectOk(), number)
        elif isinstance(came, Exchange.Declare):
            self._declare(number, came)
        elif isinstance(came, Basic.Qos):  # some clients ask for it on every channel
            self._send(Basic.QosOk(), number)
        else:
            self._refuse(came)

    def _open_lane(self, number: int) -> None:
        if number in self._lanes or number > CHANNELS:
            self.close(_CHANNEL_ERROR, f"CHANNEL_ERROR - channel {number} cannot be opened")
            return
        self._lanes[number] = Lane(self, number)
        self._send(Channel.OpenOk(), number)

    def _declare(self, number: int, came: Any) -> None:
        if came.exchange != HEARTBEATS:
            text = f"NOT_FOUND - a relay has no exchange '{str(came.exchange)[:64]}'"
            self._close_lane(number, _NOT_FOUND, text, Exchange.Declare)
        elif not came.passive and not (came.exchange_type == "topic" and came.durable):
            text = f"PRECONDITION_FAILED - exchange '{HEARTBEATS}' is a durable topic exchange"
            self._close_lane(number, _PRECONDITION_FAILED, text, Exchange.Declare)
        elif not came.nowait:
            self._send(Exchange.DeclareOk(), number)

    def _refuse(self, came: Any) -> None:
        self.close(
            _NOT_IMPLEMENTED,
            f"NOT_IMPLEMENTED - a relay takes heartbeats and nothing else: no {_name(came)}",
            _ids(type(came)),
        )

    def _close_lane(self, number: int, code: int, text: str, cause: type[Any]) -> None:
        log.warning("%s: %s", self._who, text)
        del self._lanes[number]
        self._closing.add(number)
        self._send(Channel.Close(code, text, *_ids(cause)), number)

    def _send(self, method: Any, channel: int = 0) -> None:
        self.write(frame.marshal(method, channel))

    def _limit(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.abort)

    def _end(self) -> None:
        """Write what is to be written, and close."""
        self._is_over = True
        self.stop_beating()
        if self._transport is not None:
            self._transport.close()


class Listener:
    """Listens for clients, and hands on what they publish.

    Args:
        take: Is given each message and the channel it came on, in the loop; it must not wait.
        login: ``user:password`` that clients have to give; ``None`` for whatever they give.
    """

    def __init__(self, take: Take, login: str | None = None) -> None:
        self.take = take
        self.guests: set[Guest] = set()
        self.blocked: str | None = None
        self._login = login

    @asynccontextmanager
    async def listening(
        self, host: str, port: int, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[int]:
        """Listen while the context is open; at its end clients are told that it was meant so.

        Args:
            host: The address to listen on.
            port: 0 for any that is free.
            tls: With a certificate; ``None`` for none.

        Yields:
            The port.

        Raises:
            BadConfiguration: Nobody can listen there.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                lambda: Guest(self), host, port, ssl=tls, backlog=1_024
            )
        except OSError as error:
            raise BadConfiguration(
                f"CHIFFON_RELAY_PORT: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from None
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            leaving = [guest.gone for guest in self.guests]
            for guest in self.guests:
                guest.close(_FORCED, "CONNECTION_FORCED - the relay stops")
            if leaving:
                await asyncio.wait(leaving)  # each is cut off after 3 s

    def lets_in(self, mechanism: str | None, response: str | bytes | None) -> bool:
        """Return whether this is the login that clients have to give."""
        given = (response or "").encode() if not isinstance(response, bytes) else response
        _, _, credentials = given.partition(b"\0")
        wanted = (self._login or "").replace(":", "\0", 1).encode()
        is_it = hmac.compare_digest(credentials, wanted)
        return mechanism == "PLAIN" and (is_it or self._login is None)

    def block(self, reason: str) -> None:
        """Ask clients to publish nothing, until ``unblock``."""
        if self.blocked is None:
            self.blocked = reason
            for guest in self.guests:
                guest.tell_blocked(reason)

    def unblock(self) -> None:
        """Let clients publish again."""
        if self.blocked is not None:
            self.blocked = None
            for guest in self.guests:
                guest.tell_blocked(None)


def _ids(kind: type[Any]) -> tuple[int, int]:
    number: int = kind.index
    return divmod(number, 1 << 16)


def _name(method: Any) -> str:
    return str(method.name).lower()


def _place(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a socket"
