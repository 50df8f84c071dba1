"""What a relay makes of the heartbeats that it holds."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from chiffon import arrays, liveness
from chiffon.arrays import gathered
from chiffon.encoding import MAX_ARRAY_BYTES, decode_heartbeats, encode, routing_key
from chiffon.frames import Delivery
from chiffon.messages import STATUS_UPDATE, StatusUpdate
from chiffon.receipt import Receipt
from tests.fixtures.heartbeats import update

NOW = time.monotonic()
HEADER = ContentHeader(properties=Basic.Properties(message_type=STATUS_UPDATE))

Kept = tuple[Receipt, Delivery]


def kept(heartbeat: StatusUpdate, held: float, body: bytes | None = None) -> Kept:
    delivery = Delivery(
        1, "chiffon.heartbeats", routing_key(heartbeat), HEADER, body or encode(heartbeat)
    )
    return Receipt(heartbeat, NOW - held), delivery


HEARTBEATS = st.builds(
    lambda pool_name, interval_seconds, status, held: kept(
        update(pool_name=pool_name, interval_seconds=interval_seconds, status=status), held
    ),
    st.sampled_from(["default", "lab"]),
    st.sampled_from([0.5, 5.0, 60.0]),
    st.sampled_from(["online", "busy", "offline"]),
    st.floats(0, 20),
)


@given(st.lists(HEARTBEATS, max_size=30))
def test_every_heartbeat_goes_on_once_or_has_outlived_its_lease(held: list[Kept]) -> None:
    made, outlived = gathered(held, "relay-1", NOW)

    sent: dict[int, tuple[Any, StatusUpdate]] = {}
    for array in made:
        updates, refusals = decode_heartbeats(array.body, array.routing_key)
        assert not refusals
        assert [one.agent_id.int for one in updates] == array.agents
        sent.update({one.agent_id.int: (array, one) for one in updates})
    assert len(sent) == sum(len(array.agents) for array in made)
    assert set(sent) | set(outlived) == {receipt.update.agent_id.int for receipt, _ in held}
    assert not set(sent) & set(outlived)
    for (heartbeat, received), _ in held:
        lease, age = liveness.lease(heartbeat.interval_seconds), NOW - received
        if heartbeat.agent_id.int in outlived:
            assert age >= lease
            assert not heartbeat.is_farewell
            continue
        array, on_its_way = sent[heartbeat.agent_id.int]
        properties = array.properties
        assert on_its_way == heartbeat
        assert array.routing_key == f"heartbeat.{heartbeat.pool_name}.relay.relay-1"
        said = properties.headers["chiffon-held-ms"] / 1_000
        assert age - 0.001 <= said <= age + arrays.ABREAST_SECONDS, "never younger than it is"
        if heartbeat.is_farewell:
            assert (properties.expiration, properties.delivery_mode) == (None, 2)
        else:
            assert int(properties.expiration) / 1_000 <= lease - age + 0.001
            assert properties.delivery_mode == 1


def test_an_array_has_at_most_a_thousand_heartbeats_and_a_mebibyte() -> None:
    many = [kept(update(), 0.0) for _ in range(2_001)]
    wide = [kept(update(capabilities=["x" * 60] * 64), 0.0) for _ in range(600)]

    assert [len(array.agents) for array in gathered(many, "r", NOW)[0]] == [1_000, 1_000, 1]
    sizes = [len(array.body) for array in gathered(wide, "r", NOW)[0]]
    assert max(sizes) <= MAX_ARRAY_BYTES
    assert max(sizes) > MAX_ARRAY_BYTES - 5_000, "arrays are as large as they may be"


def test_what_a_later_version_says_goes_on_as_it_came() -> None:
    heartbeat = update()
    newer = json.dumps({**json.loads(encode(heartbeat)), "mood": "fine"}).encode()

    [array], _ = gathered([kept(heartbeat, 0.0, newer)], "r", NOW)

    assert json.loads(array.body)[0]["mood"] == "fine"


def test_a_relay_behind_a_relay_takes_its_arrays_apart() -> None:
    first, second = update(), update(pool_name="lab")
    both = b"[" + encode(first) + b"," + encode(second) + b"]"

    made, _ = gathered([kept(first, 0.0, both), kept(second, 0.0, both)], "r", NOW)

    assert [decode_heartbeats(array.body, array.routing_key)[0] for array in made] == [
        [first],
        [second],
    ]


def test_what_cannot_be_read_within_an_array_goes_on_as_we_read_it() -> None:
    """The parser has a limit of depth, and an array is one level more."""
    heartbeat, other = update(), update()
    deep = json.loads(encode(heartbeat))
    deep["future"] = "DEEP"
    body = json.dumps(deep).replace('"DEEP"', "[" * 199 + "]" * 199).encode()
    assert decode_heartbeats(body, routing_key(heartbeat))[0] == [heartbeat]

    [array], _ = gathered([kept(heartbeat, 0.0, body), kept(other, 0.0)], "r", NOW)

    assert decode_heartbeats(array.body, array.routing_key) == ([heartbeat, other], ())


def test_what_is_too_large_for_an_array_goes_nowhere_and_costs_nothing_else() -> None:
    large = kept(update(), 0.0, b"[" + b" " * MAX_ARRAY_BYTES + b"]")
    wide = update(capabilities=["x" * 60] * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "encode", lambda _: b"x" * MAX_ARRAY_BYTES)
        made, dropped = gathered([large, kept(wide, 0.0)], "r", NOW)

    assert dropped == [large[0].update.agent_id.int]
    assert [array.agents for array in made] == [[wide.agent_id.int]]
