"""The broker's end of a connection, as far as a publisher of heartbeats needs it.

A login, channels, confirms, the look whether the exchange is there, and publishing to it. Whatever
else is asked for is refused in the protocol's own words, so that a client says what it would say
to a broker.
"""

import asyncio
import logging
from typing import Any, Protocol

from pamqp import frame
from pamqp.commands import Basic, Channel, Confirm, Exchange
from pamqp.commands import Connection as Amqp

from chiffon import __version__
from chiffon.encoding import MAX_ARRAY_BYTES
from chiffon.errors import BusUnavailable
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

CHANNELS = 8
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 3.0
HEARTBEAT_SECONDS = 60
"""What we propose; a client that wants its dead line noticed earlier says so."""

UNSETTLED = 1_000
UNSETTLED_BYTES = 4 * 1024 * 1024
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
_ACCESS_REFUSED, _NOT_FOUND, _PRECONDITION_FAILED = 403, 404, 406
_FRAME_ERROR, _COMMAND_INVALID, _CHANNEL_ERROR, _NOT_IMPLEMENTED = 501, 503, 504, 540


class Lane:
    """A channel of a client: what was published on it, and how much of that is settled."""

    def __init__(self, guest: "Guest", number: int) -> None:
        self.published = self.bytes_published = 0
        self.guest = guest
        self._number = number
        self._settled = self._bytes_settled = 0
        self._confirms_after: int | None = None

    def confirm(self) -> None:
        """Answer each message from now on."""
        if self._confirms_after is None:
            self._confirms_after = self.published

    def close(self) -> None:
        """Answer nothing any more: the number may be another channel's by then."""
        self._confirms_after = None

    def settle(self, upto: int, upto_bytes: int, *, is_taken: bool) -> None:
        """Answer all messages up to one, by its number on this channel."""
        self._settled, self._bytes_settled = upto, upto_bytes
        if self._confirms_after is not None and upto > self._confirms_after:
            answer = acknowledgement if is_taken else refusal
            self.guest.write(answer(upto - self._confirms_after, self._number))
        self.guest.read_on()

    @property
    def is_full(self) -> bool:
        """Whether too much is waiting for its answer."""
        return (
            self.published - self._settled >= UNSETTLED
            or self.bytes_published - self._bytes_settled >= UNSETTLED_BYTES
        )


class Host(Protocol):
    """What a client dialled; see ``Listener``."""

    guests: "set[Guest]"
    blocked: str | None

    def take(self, lane: Lane, delivery: Delivery) -> None:
        """Take a message and the channel it came on; it must not wait."""

    def lets_in(self, mechanism: str | None, response: str | bytes | None) -> bool:
        """Return whether this is the login that clients have to give."""


class Guest(Peer):
    """A client's connection.

    Args:
        host: What it dialled.
    """

    def __init__(self, host: Host) -> None:
        # Until all is agreed on there are no channels, and so no messages.
        frames = Frames(range(0), of_publisher=True, max_body_bytes=MAX_ARRAY_BYTES)
        super().__init__(frames, "a client")
        self._host = host
        self._greeting: bytes | None = b""
        self._next: type[Any] | None = Amqp.StartOk
        """The method that has to come next; ``None`` once all is agreed."""
        self._lanes: dict[int, Lane] = {}
        self._closing: set[int] = set()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hears_of_blocks = self._is_blocked = self._is_over = False
        self._deadline: asyncio.TimerHandle | None = None

    def read_on(self) -> None:
        """Read on, if what was waiting for its answer has one."""
        if not any(one.is_full for one in self._lanes.values()):
            self.resume()

    def write(self, data: bytes) -> None:  # noqa: D102
        super().write(data)
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() > UNREAD_BYTES:
            log.warning("%s reads nothing of what it is told: cut off", self._who)
            self.abort()

    def tell_blocked(self, reason: str | None) -> None:
        """Ask the client to publish nothing for the time being; with ``None``, to go on."""
        if self._is_over:
            return
        if reason is None:
            if self._is_blocked:
                self._is_blocked = False
                self._send(Amqp.Unblocked())
        # A client without a channel is still dialling: some would wait in the midst of it.
        elif self._lanes and self._hears_of_blocks and not self._is_blocked:
            self._is_blocked = True
            self._send(Amqp.Blocked(_short(reason)))

    def close(self, code: int, text: str, cause: tuple[int, int] = (0, 0)) -> None:
        """Close the connection with a reason, and wait 3 s for the client's word on it."""
        if self._is_over:
            return
        self._is_over = True
        self._close_lanes()
        self._send(Amqp.Close(code, _short(text), *cause))
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
        self._host.guests.add(self)
        self._limit(HANDSHAKE_SECONDS)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._is_over = True
        self._close_lanes()
        self._host.guests.discard(self)
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
                lane.bytes_published += len(delivery.body)
                self._host.take(lane, delivery)
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
            self._frames.channels = range(1, CHANNELS + 1)
            self._limit(None)
            self._send(Amqp.OpenOk())

    def _log_in(self, came: Any) -> None:
        properties = came.client_properties or {}
        capabilities = properties.get("capabilities") or {}
        name = properties.get("connection_name")
        if name:
            self._who = f"{str(name)[:64]!r} at {self._who.rpartition(' ')[2]}"
        self._hears_of_blocks = bool(capabilities.get("connection.blocked"))
        if not self._host.lets_in(came.mechanism, came.response):
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
            self._lanes.pop(number).close()
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
        if self._host.blocked is not None:
            self.tell_blocked(self._host.blocked)

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
        self._lanes.pop(number).close()
        self._closing.add(number)
        self._send(Channel.Close(code, _short(text), *_ids(cause)), number)

    def _close_lanes(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()

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
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._limit(CLOSE_SECONDS)  # for what it does not read


def _short(text: str) -> str:
    """Return at most as much as the protocol has room for: 255 bytes."""
    return text.encode()[:255].decode(errors="ignore")


def _ids(kind: type[Any]) -> tuple[int, int]:
    number: int = kind.index
    return divmod(number, 1 << 16)


def _name(method: Any) -> str:
    return str(method.name).lower()


def _place(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a socket"
