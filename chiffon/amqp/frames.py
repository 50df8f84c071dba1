"""AMQP 0-9-1 frames to deliveries, as far as the consumer of heartbeats needs them.

A delivery is three kinds of frames: a method, a header, and the body in pieces. At thousands of
deliveries a second, decoding each field of each frame is most of a consumer's work. So only what
ingest needs is decoded here: the delivery tag, exchange, routing key and body. Properties are
decoded once for all messages that have the same bytes, as a fleet's heartbeats do. Everything but
deliveries is left to pamqp. No I/O.
"""

from dataclasses import dataclass
from struct import Struct
from struct import error as StructError
from typing import Any, NamedTuple

from pamqp import frame as pamqp
from pamqp.exceptions import PAMQPException
from pamqp.header import ContentHeader

from chiffon.amqp.properties import give_up
from chiffon.errors import BusUnavailable

MAX_FRAME_BYTES = 131_072
"""What we offer the broker, and RabbitMQ's own default."""

CHANNEL = 1
"""The only channel that deliveries come on."""

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_END = 0xCE
_FRAME = Struct(">BHI")  # kind, channel, size of the payload
_OVERHEAD = _FRAME.size + 1
_BASIC_DELIVER = (60 << 16) | 60
_METHOD_ID = Struct(">I")
_TAG = Struct(">Q")
_CONTENT = Struct(">HHQ")  # class, weight, size of the body
_BASIC_CLASS = 60
_ANSWER = Struct(">BHIIQBB")

_KNOWN_HEADERS = 256
_LONGEST_KNOWN_BYTES = 512


class Delivery(NamedTuple):
    """A message as it came; ``tag`` is what it is acknowledged by."""

    tag: int
    exchange: str
    routing_key: str
    header: ContentHeader
    body: bytes


class Method(NamedTuple):
    """A method that is no delivery, as pamqp has it; ``after`` so many deliveries of the chunk."""

    after: int
    frame: Any


class BadFrame(BusUnavailable):
    """What came is not AMQP, or not in its order: the connection cannot be used further."""


@dataclass(slots=True)
class _Partial:
    """A delivery of which the header, or a part of the body, is still to come."""

    tag: int
    exchange: str
    routing_key: str
    parts: list[bytes]
    header: ContentHeader | None = None
    missing: int = 0


class FrameReader:
    """Reads the frames of one connection, in whatever chunks they come."""

    def __init__(self) -> None:
        self.max_frame_bytes = MAX_FRAME_BYTES
        self._rest = b""
        self._partial: _Partial | None = None
        self._headers: dict[bytes, ContentHeader] = {}

    def read(self, data: bytes) -> tuple[list[Delivery], list[Method]]:
        """Return what became whole with ``data``.

        Returns:
            Deliveries, and the other methods, each in their order.

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
                self._continue(kind, channel, data[at + 7 : last], deliveries)
            elif _METHOD_ID.unpack_from(data, at + 7)[0] == _BASIC_DELIVER:
                self._begin(channel, data, at + 11, last)
            else:
                methods.append(Method(len(deliveries), _method(data[at : last + 1])))
            at = last + 1
        return at

    def _begin(self, channel: int, data: bytes, offset: int, last: int) -> None:
        """Read what the broker says of a message before its header and body."""
        if self._partial is not None or channel != CHANNEL:
            raise BadFrame("a delivery within another, or on a channel that is not open")
        offset += 1 + data[offset]  # the consumer's tag: there is only one
        tag = _TAG.unpack_from(data, offset)[0]
        start = offset + 10  # behind the tag, and whether it is redelivered, which changes nothing
        offset = start + data[start - 1]
        exchange = data[start:offset]
        start = offset + 1
        offset = start + data[offset]
        if offset != last:
            raise BadFrame("a delivery that is longer or shorter than it says")
        key = data[start:offset]
        self._partial = _Partial(
            tag, exchange.decode(errors="replace"), key.decode(errors="replace"), []
        )

    def _continue(
        self, kind: int, channel: int, payload: bytes, deliveries: list[Delivery]
    ) -> None:
        if kind == _HEARTBEAT:
            return
        partial = self._partial
        if partial is None or channel != CHANNEL:
            raise BadFrame(f"a frame of kind {kind} that belongs to no delivery")
        if partial.header is None:
            if kind != _HEADER:
                raise BadFrame(f"a frame of kind {kind} where a header belongs")
            class_id, _, partial.missing = _CONTENT.unpack_from(payload)
            if class_id != _BASIC_CLASS:
                raise BadFrame(f"a header of class {class_id}")
            partial.header = self._header(payload[_CONTENT.size :])
        elif kind != _BODY or not 0 < len(payload) <= partial.missing:
            raise BadFrame(f"a frame of kind {kind}, {len(payload)} bytes, out of its order")
        else:
            partial.missing -= len(payload)
            partial.parts.append(payload)
        if partial.missing:
            return
        self._partial = None
        parts = partial.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        deliveries.append(
            Delivery(partial.tag, partial.exchange, partial.routing_key, partial.header, body)
        )

    def _header(self, properties: bytes) -> ContentHeader:
        known = self._headers.get(properties)
        if known is not None:
            return known
        header = ContentHeader()
        try:
            header.unmarshal(_CONTENT.pack(_BASIC_CLASS, 0, 0) + properties)
        except Exception as error:
            # Whatever a publisher made its decoders meet: the message is at fault, not the frame.
            give_up(header, error)
        if len(self._headers) >= _KNOWN_HEADERS:
            self._headers.clear()
        if len(properties) <= _LONGEST_KNOWN_BYTES:
            self._headers[properties] = header
        return header


def _method(data: bytes) -> Any:
    try:
        return pamqp.unmarshal(data)[2]
    except (PAMQPException, ValueError, KeyError, OverflowError) as error:
        raise BadFrame(f"a method that cannot be decoded: {error!r}") from None


def acknowledgement(tag: int) -> bytes:
    """Return the frame that acknowledges a delivery and all before it."""
    return _ANSWER.pack(_METHOD, CHANNEL, 13, (60 << 16) | 80, tag, 1, _END)


def rejection(tag: int) -> bytes:
    """Return the frame that rejects one delivery for good: the broker dead-letters it."""
    return _ANSWER.pack(_METHOD, CHANNEL, 13, (60 << 16) | 90, tag, 0, _END)


HEARTBEAT = bytes((_HEARTBEAT, 0, 0, 0, 0, 0, 0, _END))
