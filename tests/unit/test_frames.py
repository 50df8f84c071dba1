"""Reading frames: beside pamqp, in any pieces, and whatever else comes."""

import struct
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from chiffon.amqp.frames import (
    BadFrame,
    Delivery,
    FrameReader,
    Method,
    acknowledgement,
    rejection,
)
from chiffon.amqp.properties import undecodable

SHORT = st.text(max_size=60)
PROPERTIES = st.builds(
    commands.Basic.Properties,
    message_type=st.none() | SHORT,
    content_type=st.none() | SHORT,
    delivery_mode=st.none() | st.sampled_from([1, 2]),
    expiration=st.none() | st.just("15000"),
    headers=st.none()
    | st.dictionaries(st.text(max_size=20), st.integers(0, 2**31 - 1) | SHORT, max_size=3),
    message_id=st.none() | SHORT,
)
EXCHANGES = st.from_regex(r"[A-Za-z0-9_.-]{0,60}", fullmatch=True)
MESSAGES = st.tuples(
    st.integers(1, 2**63 - 1),
    EXCHANGES,
    SHORT,
    PROPERTIES,
    st.binary(max_size=500),
    st.integers(1, 99),
)
OTHERS = st.sampled_from(
    [
        commands.Connection.Blocked("low on memory"),
        commands.Connection.Unblocked(),
        commands.Basic.Cancel("ctag"),
        commands.Basic.ConsumeOk("ctag"),
        commands.Channel.Close(404, "NOT_FOUND", 60, 40),
    ]
)


def written(message: tuple[Any, ...]) -> bytes:
    """Return the frames of a delivery as pamqp writes them, the body in several."""
    tag, exchange, key, properties, body, piece = message
    parts = [
        frame.marshal(commands.Basic.Deliver("ctag", tag, False, exchange, key), 1),
        frame.marshal(ContentHeader(0, len(body), properties), 1),
    ]
    parts += [
        frame.marshal(ContentBody(body[at : at + piece]), 1) for at in range(0, len(body), piece)
    ]
    return b"".join(parts)


def read(data: bytes, cuts: list[int]) -> tuple[list[Delivery], list[Method]]:
    """Feed ``data`` in pieces."""
    frames = FrameReader()
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    deliveries: list[Delivery] = []
    methods: list[Method] = []
    for start, end in pairwise(places):
        more = frames.read(data[start:end])
        deliveries += more[0]
        methods += more[1]
    return deliveries, methods


@given(
    st.lists(st.one_of(MESSAGES, OTHERS, st.just(None)), max_size=12),
    st.lists(st.integers(0, 100_000), max_size=20),
)
def test_what_pamqp_writes_is_read_in_whatever_pieces_it_comes(
    sent: list[Any], cuts: list[int]
) -> None:
    data = b"".join(
        Heartbeat().marshal()
        if one is None
        else written(one)
        if isinstance(one, tuple)
        else frame.marshal(one, 0)
        for one in sent
    )

    deliveries, methods = read(data, cuts)

    messages = [one for one in sent if isinstance(one, tuple)]
    assert [type(one.frame) for one in methods] == [
        type(one) for one in sent if one is not None and not isinstance(one, tuple)
    ]
    assert len(deliveries) == len(messages)
    for got, (tag, exchange, key, properties, body, _) in zip(deliveries, messages, strict=True):
        assert (got.tag, got.exchange, got.routing_key, got.body) == (tag, exchange, key, body)
        # pamqp does not write what is empty.
        for name, value in properties:
            assert (getattr(got.header.properties, name) or None) == (value or None), name
        assert undecodable(got.header) is None


@given(
    st.lists(MESSAGES, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=5),
    st.lists(st.integers(0, 100_000), max_size=5),
)
def test_bytes_that_were_changed_on_the_way_end_in_nothing_but_a_bad_frame(
    sent: list[Any], changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    data = bytearray(b"".join(written(one) for one in sent))
    for place, value in changes:
        data[place % len(data)] = value
    with suppress(BadFrame):
        read(bytes(data), cuts)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_any_bytes_end_in_nothing_but_a_bad_frame(data: bytes, cuts: list[int]) -> None:
    with suppress(BadFrame):
        read(data, cuts)


DELIVER = frame.marshal(commands.Basic.Deliver("c", 1, False, "x", "k"), 1)
HEADER = frame.marshal(ContentHeader(0, 4, commands.Basic.Properties()), 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "a frame of"),
        (DELIVER + DELIVER, "within another"),
        (HEADER, "belongs to no delivery"),
        (DELIVER + frame.marshal(ContentBody(b"body"), 1), "where a header belongs"),
        (DELIVER + HEADER + frame.marshal(ContentBody(b"too long"), 1), "out of its order"),
        (DELIVER + HEADER + frame.marshal(ContentBody(b""), 1), "out of its order"),
        (DELIVER[:-1] + b"\0", "without its end"),
        (
            frame.marshal(commands.Basic.Deliver("c", 1, False, "x", "k"), 7),
            "channel that is not open",
        ),
        (struct.pack(">BHI", 1, 1, 2**31) + b"\0", "at most 131072"),
        (struct.pack(">BHIHHB", 1, 1, 5, 60, 60, 200) + b"\xce", "a frame that is too short"),
        (struct.pack(">BHIHH", 1, 1, 4, 99, 99) + b"\xce", "cannot be decoded"),
    ],
)
def test_what_is_out_of_order_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadFrame, match=reason):
        FrameReader().read(data)


def test_properties_that_no_library_can_decode_cost_only_their_message() -> None:
    truncated = struct.pack(">HHQH", 60, 0, 4, 0x2000) + b"\xff"
    data = DELIVER + struct.pack(">BHI", 2, 1, len(truncated)) + truncated + b"\xce"
    data += frame.marshal(ContentBody(b"body"), 1)

    [delivery], _ = FrameReader().read(data + b"")

    assert delivery.body == b"body"
    assert "cannot be decoded" in (undecodable(delivery.header) or "")


def test_an_empty_body_is_a_message_too() -> None:
    data = DELIVER + frame.marshal(ContentHeader(0, 0, commands.Basic.Properties()), 1)

    [delivery], _ = FrameReader().read(data)

    assert delivery.body == b""


@given(st.integers(0, 2**63 - 1))
def test_answers_are_those_that_pamqp_writes(tag: int) -> None:
    assert acknowledgement(tag) == frame.marshal(commands.Basic.Ack(tag, True), 1)
    assert rejection(tag) == frame.marshal(commands.Basic.Reject(tag, False), 1)


def test_a_method_says_which_messages_came_before_it() -> None:
    message = DELIVER + HEADER + frame.marshal(ContentBody(b"body"), 1)
    opened = frame.marshal(commands.Channel.Open(), 5)

    deliveries, methods = FrameReader().read(message + opened + message + message + opened)

    assert len(deliveries) == 3
    assert [one.after for one in methods] == [1, 3]
