"""Heartbeats to the arrays that a relay publishes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from chiffon import liveness
from chiffon.bus import Properties
from chiffon.encoding import MAX_ARRAY_BYTES, MAX_ARRAY_HEARTBEATS, encode
from chiffon.frames import Delivery
from chiffon.messages import STATUS_UPDATE
from chiffon.receipt import Receipt
from chiffon.topology import HELD_HEADER, relay_key

_DEEPEST = 150
ABREAST_SECONDS = 1.0
"""Heartbeats of one array came within so long of each other: it has one age for all of them."""


@dataclass(frozen=True, slots=True)
class Array:
    """Heartbeats that go on as one message. ``agents`` are the numbers of their ids."""

    body: bytes
    routing_key: str
    properties: Properties
    agents: list[int]


def gathered(
    kept: Iterable[tuple[Receipt, Delivery]], name: str, now: float
) -> tuple[list[Array], list[int]]:
    """Return the arrays that heartbeats go on in.

    Those of an array are of one pool and have the same lease, and the same age within a second;
    farewells, which never expire and are kept on disk, are apart.

    Args:
        kept: Each agent's newest, and the message that it came in.
        name: Of the relay.
        now: Seconds of ``time.monotonic``.

    Returns:
        The arrays, and the numbers of the agents whose heartbeat goes nowhere: it has outlived its
        lease, or is too large for an array.
    """
    alike: dict[tuple[str, bool, float, int], list[tuple[int, float, bytes]]] = {}
    dropped: list[int] = []
    for (update, received), delivery in kept:
        lease, held = liveness.lease(update.interval_seconds), max(now - received, 0.0)
        body = delivery.body if _goes_as_it_came(delivery.body) else encode(update)
        if (held >= lease and not update.is_farewell) or len(body) + 2 > MAX_ARRAY_BYTES:
            dropped.append(update.agent_id.int)
            continue
        group = update.pool_name, update.is_farewell, lease, int(held / ABREAST_SECONDS)
        alike.setdefault(group, []).append((update.agent_id.int, held, body))
    arrays = [
        _array(relay_key(pool_name, name), lease, is_farewell, part)
        for (pool_name, is_farewell, lease, _), members in alike.items()
        for part in _parts(members)
    ]
    return arrays, dropped


def _goes_as_it_came(body: bytes) -> bool:
    """Whether a body is one heartbeat, with whatever a later version of the contract has in it.

    It must be readable within an array as well, for the parser has a limit of depth.
    """
    return body[:1] == b"{" and body.count(b"[") + body.count(b"{") < _DEEPEST


def _parts(
    members: Sequence[tuple[int, float, bytes]],
) -> Iterable[Sequence[tuple[int, float, bytes]]]:
    """Split what is too much for one array."""
    first = size = 0
    for position, (_, _, body) in enumerate(members):
        size += len(body) + 1
        if position > first and (
            size + 1 > MAX_ARRAY_BYTES or position - first == MAX_ARRAY_HEARTBEATS
        ):
            yield members[first:position]
            first, size = position, len(body) + 1
    yield members[first:]


def _array(
    key: str, lease: float, is_farewell: bool, members: Sequence[tuple[int, float, bytes]]
) -> Array:
    held = max(held for _, held, _ in members)
    return Array(
        b"[" + b",".join(body for _, _, body in members) + b"]",
        key,
        Properties(
            message_type=STATUS_UPDATE,
            content_type="application/json",
            delivery_mode=2 if is_farewell else 1,
            expiration=None if is_farewell else str(max(int((lease - held) * 1_000), 1)),
            headers={HELD_HEADER: int(held * 1_000)},
        ),
        [agent for agent, _, _ in members],
    )
