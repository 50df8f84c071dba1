"""AMQP 0-9-1 frames to messages: the part of the protocol that a reader of heartbeats needs.

A message is three kinds of frames, and at thousands a second decoding each field of each of them
is most of a reader's work. Here only what ingest needs is read: the tag, the names, the body.
Properties are decoded once for all messages that have the same bytes, which a fleet's heartbeats
have; everything but messages is left to pamqp. No I/O.
"""

from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from pamqp import frame as pamqp
from pamqp.exceptions import PAMQPException
from pamqp.header import ContentHeader

from chiffon import decoding
from chiffon.errors import BusUnavailable

MAX_FRAME_BYTES = 131_072
"""What we offer the broker, and RabbitMQ's own default."""

MOST_PARTS = 4_096
"""Of one body; each costs more memory than a byte or two that it may bring."""

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_END = 0xCE
_FRAME = Struct(">BHI")  # kind, channel, size of the payload
_OVERHEAD = _FRAME.size + 1
_BASIC_PUBLISH, _BASIC_DELIVER = (60 << 16) | 40, (60 << 16) | 60
_METHOD_ID = Struct(">I")
_TAG = Struct(">Q")
_CONTENT = Struct(">HHQ")  # class, weight, size of the body
_BASIC_CLASS = 60
_ANSWER = Struct(">BHIIQBB")

_KNOWN_HEADERS = 256
_LONGEST_KNOWN_BYTES = 512

decoding.install()


class Delivery(NamedTuple):
    """A message as it came; ``tag`` is what a consumer acknowledges it by, 0 from a publisher."""

    tag: int
    exchange: str
    routing_key: str
    header: ContentHeader
    body: bytes
    channel: int = 1


class Method(NamedTuple):
    """Whatever came that is no part of a message, as pamqp has it.

    ``after`` is how many messages of the same piece came before it.
    """

    channel: int
    after: int
    frame: Any


class BadFrame(BusUnavailable):
    """What came is not AMQP, or not in its order: the connection cannot be used further."""


@dataclass(slots=True)
class _Content:
    """A message of which the header, or a part of the body, is still to come."""

    tag: int
    exchange: str
    routing_key: str
    parts: list[bytes]
    header: ContentHeader | None = None
    missing: int = 0


class Frames:
    """Reads the frames of one connection, in whatever pieces they come.

    Args:
        channels: On which there may be messages.
        of_publisher: Whether a publisher is at the other end, and not the broker.
        max_body_bytes: The largest message to read.

    ``channels`` may be changed as channels are agreed on.
    """

    def __init__(
        self,
        channels: range = range(1, 2),
        *,
        of_publisher: bool = False,
        max_body_bytes: int = 2**63,
    ) -> None:
        self.max_frame_bytes = MAX_FRAME_BYTES
        self.channels = channels
        self._method_of_messages = _BASIC_PUBLISH if of_publisher else _BASIC_DELIVER
        self._begin = _published if of_publisher else _delivered
        self._max_body_bytes = max_body_bytes
        self._rest = b""
        self._contents: dict[int, _Content] = {}
        self._headers: dict[bytes, ContentHeader] = {}

    def read(self, data: bytes) -> tuple[list[Delivery], list[Method]]:
        """Return what became whole with ``data``.

        Returns:
            Messages, and the other methods, each in their order.

        Raises:
            BadFrame: Not AMQP, or out of its order. Nothing that follows can be read.
        """
        deliveries: list[Delivery] = []
        methods: list[Method] = []
        if self._rest:
            data = self._rest + data
        try:
            at = self._read(data, deliveries, methods)
        except (StructError, IndexError) as error:
            raise BadFrame(f"a frame that is too short: {error}") from None
        self._rest = data[at:]
        return deliveries, methods

    def _read(self, data: bytes, deliveries: list[Delivery], methods: list[Method]) -> int:
        """Read whole frames, and return where the rest begins."""
        at, end = 0, len(data)
        while end - at >= _OVERHEAD:
            kind, channel, size = _FRAME.unpack_from(data, at)
            last = at + _FRAME.size + size
            if size + _OVERHEAD > self.max_frame_bytes:
                raise BadFrame(f"a frame of {size} bytes; at most {self.max_frame_bytes}")
            if last >= end:
                break
            if data[last] != _END:
                raise BadFrame("a frame without its end")
            if kind != _METHOD:
                self._continue(kind, channel, data, at + 7, last, deliveries)
            elif not self._begins(data, at + 7, last, channel):
                methods.append(Method(channel, len(deliveries), _method(data[at : last + 1])))
            at = last + 1
        return at

    def _begins(self, data: bytes, at: int, last: int, channel: int) -> bool:
        if _METHOD_ID.unpack_from(data, at)[0] != self._method_of_messages:
            return False
        if channel in self._contents or channel not in self.channels:
            raise BadFrame("a message in the midst of another, or on no open channel")
        self._contents[channel] = self._begin(data, at + 4, last)
        return True

    def _continue(
        self,
        kind: int,
        channel: int,
        data: bytes,
        start: int,
        last: int,
        deliveries: list[Delivery],
    ) -> None:
        if kind == _HEARTBEAT:
            return
        content = self._contents.get(channel)
        if content is None:
            raise BadFrame(f"a frame of kind {kind} that belongs to no message")
        if content.header is None:
            self._head(content, kind, data[start:last])
        elif kind != _BODY or not 0 < last - start <= content.missing:
            raise BadFrame(f"a frame of kind {kind}, {last - start} bytes, out of its order")
        elif len(content.parts) >= MOST_PARTS:
            raise BadFrame(f"a body in more than {MOST_PARTS} frames")
        else:
            content.missing -= last - start
            content.parts.append(data[start:last])
        if content.missing:
            return
        del self._contents[channel]
        assert content.header is not None
        parts = content.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        deliveries.append(
            Delivery(
                content.tag, content.exchange, content.routing_key, content.header, body, channel
            )
        )

    def _head(self, content: _Content, kind: int, payload: bytes) -> None:
        if kind != _HEADER:
            raise BadFrame(f"a frame of kind {kind} where a header belongs")
        class_id, _, content.missing = _CONTENT.unpack_from(payload)
        if class_id != _BASIC_CLASS:
            raise BadFrame(f"a header of class {class_id}")
        if content.missing > self._max_body_bytes:
            raise BadFrame(f"a body of {content.missing} bytes; at most {self._max_body_bytes}")
        content.header = self._header(payload[_CONTENT.size :])

    def _header(self, properties: bytes) -> ContentHeader:
        known = self._headers.get(properties)
        if known is not None:
            return known
        header = ContentHeader()
        try:
            header.unmarshal(_CONTENT.pack(_BASIC_CLASS, 0, 0) + properties)
        except Exception as error:
            # Whatever a publisher made its decoders meet: the message is at fault, not the frame.
            decoding.give_up(header, error)
        if len(self._headers) >= _KNOWN_HEADERS:
            self._headers.clear()
        if len(properties) <= _LONGEST_KNOWN_BYTES:
            self._headers[properties] = header
        return header


def _delivered(data: bytes, place: int, last: int) -> _Content:
    """Read what the broker says of a message before its header and body."""
    place += 1 + data[place]  # the consumer's tag: there is only one
    tag = _TAG.unpack_from(data, place)[0]
    place += 9  # and whether it is delivered again, which changes nothing
    return _begun(tag, data, place, last)


def _published(data: bytes, place: int, last: int) -> _Content:
    """Read what a publisher says of a message before its header and body."""
    # A reserved number before the names, and after them whether it must be routed: it must.
    return _begun(0, data, place + 2, last - 1)


def _begun(tag: int, data: bytes, place: int, last: int) -> _Content:
    start = place + 1
    place = start + data[place]
    exchange = data[start:place]
    start = place + 1
    place = start + data[place]
    if place != last:
        raise BadFrame("a message that is longer or shorter than it says")
    key = data[start:place]
    return _Content(tag, exchange.decode(errors="replace"), key.decode(errors="replace"), [])


def _method(data: bytes) -> Any:
    try:
        return pamqp.unmarshal(data)[2]
    except (PAMQPException, ValueError, KeyError, OverflowError) as error:
        raise BadFrame(f"a method that cannot be decoded: {error!r}") from None


def acknowledgement(tag: int, channel: int = 1) -> bytes:
    """Return the frame that acknowledges a message and all before it: a delivery, a publish."""
    return _ANSWER.pack(_METHOD, channel, 13, (60 << 16) | 80, tag, 1, _END)


def rejection(tag: int, channel: int = 1) -> bytes:
    """Return the frame that gives one delivery back for good: the broker sets it aside."""
    return _ANSWER.pack(_METHOD, channel, 13, (60 << 16) | 90, tag, 0, _END)


def refusal(tag: int, channel: int) -> bytes:
    """Return the frame that tells a publisher that a message and all before it were not taken."""
    return _ANSWER.pack(_METHOD, channel, 13, (60 << 16) | 120, tag, 1, _END)


HEARTBEAT = bytes((_HEARTBEAT, 0, 0, 0, 0, 0, 0, _END))
