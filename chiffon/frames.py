"""AMQP 0-9-1 frames to deliveries: the part of the protocol that a consumer of heartbeats reads.

A delivery is three kinds of frames, and at thousands a second decoding each field of each of them
is most of a consumer's work. Here only what ingest needs is read: the tag, the names, the body.
Properties are decoded once for all messages that have the same bytes, which a fleet's heartbeats
have; everything but deliveries is left to pamqp. No I/O.
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

decoding.install()


class Delivery(NamedTuple):
    """A message as the broker gave it to a consumer; ``tag`` is what it is acknowledged by."""

    tag: int
    exchange: str
    routing_key: str
    header: ContentHeader
    body: bytes


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
    """Reads the frames of one connection with one channel, in whatever pieces they come."""

    def __init__(self, channel: int = 1) -> None:
        self.max_frame_bytes = MAX_FRAME_BYTES
        self._channel = channel
        self._rest = b""
        self._content: _Content | None = None
        self._headers: dict[bytes, ContentHeader] = {}

    def read(self, data: bytes) -> tuple[list[Delivery], list[Any]]:
        """Return what became whole with ``data``.

        Returns:
            Deliveries, and the other methods as pamqp has them, each in their order.

        Raises:
            BadFrame: Not AMQP, or out of its order. Nothing that follows can be read.
        """
        deliveries: list[Delivery] = []
        methods: list[Any] = []
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        try:
            while end - at >= _OVERHEAD:
                kind, channel, size = _FRAME.unpack_from(data, at)
                last = at + _FRAME.size + size
                if size + _OVERHEAD > self.max_frame_bytes:
                    raise BadFrame(f"a frame of {size} bytes; at most {self.max_frame_bytes}")
                if last >= end:
                    break
                if data[last] != _END:
                    raise BadFrame("a frame without its end")
                if kind == _METHOD:
                    self._on_method(data, at, last, channel, methods)
                else:
                    self._continue(kind, channel, data, at + 7, last, deliveries)
                at = last + 1
        except (StructError, IndexError) as error:
            raise BadFrame(f"a frame that is too short: {error}") from None
        self._rest = data[at:]
        return deliveries, methods

    def _on_method(self, data: bytes, at: int, last: int, channel: int, methods: list[Any]) -> None:
        if _METHOD_ID.unpack_from(data, at + 7)[0] != _BASIC_DELIVER:
            methods.append(_method(data[at : last + 1]))
            return
        if self._content is not None or channel != self._channel:
            raise BadFrame("a delivery in the midst of another, or on no channel of ours")
        place = at + 11
        place += 1 + data[place]  # the consumer's tag: there is only one
        tag = _TAG.unpack_from(data, place)[0]
        place += 9  # and whether it is delivered again, which changes nothing
        start = place + 1
        place = start + data[place]
        exchange = data[start:place]
        start = place + 1
        place = start + data[place]
        if place != last:
            raise BadFrame("a delivery that is longer or shorter than it says")
        key = data[start:place]
        self._content = _Content(
            tag, exchange.decode(errors="replace"), key.decode(errors="replace"), []
        )

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
        content = self._content
        if content is None or channel != self._channel:
            raise BadFrame(f"a frame of kind {kind} that belongs to no delivery")
        if content.header is None:
            self._head(content, kind, data[start:last])
        elif kind != _BODY or not 0 < last - start <= content.missing:
            raise BadFrame(f"a frame of kind {kind}, {last - start} bytes, out of its order")
        else:
            content.missing -= last - start
            content.parts.append(data[start:last])
        if content.missing:
            return
        self._content = None
        assert content.header is not None
        parts = content.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        deliveries.append(
            Delivery(content.tag, content.exchange, content.routing_key, content.header, body)
        )

    def _head(self, content: _Content, kind: int, payload: bytes) -> None:
        if kind != _HEADER:
            raise BadFrame(f"a frame of kind {kind} where a header belongs")
        class_id, _, content.missing = _CONTENT.unpack_from(payload)
        if class_id != _BASIC_CLASS:
            raise BadFrame(f"a header of class {class_id}")
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


def _method(data: bytes) -> Any:
    try:
        return pamqp.unmarshal(data)[2]
    except (PAMQPException, ValueError, KeyError, OverflowError) as error:
        raise BadFrame(f"a method that cannot be decoded: {error!r}") from None


def acknowledgement(tag: int, channel: int = 1) -> bytes:
    """Return the frame that acknowledges a delivery and all before it."""
    return _ANSWER.pack(_METHOD, channel, 13, (60 << 16) | 80, tag, 1, _END)


def rejection(tag: int, channel: int = 1) -> bytes:
    """Return the frame that gives one delivery back for good: the broker sets it aside."""
    return _ANSWER.pack(_METHOD, channel, 13, (60 << 16) | 90, tag, 0, _END)


HEARTBEAT = bytes((_HEARTBEAT, 0, 0, 0, 0, 0, 0, _END))
