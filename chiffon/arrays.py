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
        The arrays, and the numbers of the agents whose heartbeat has outlived its lease.
    """
    alike: dict[tuple[str, bool, float, int], list[tuple[int, float, bytes]]] = {}
    outlived: list[int] = []
    for (update, received), delivery in kept:
        lease, held = liveness.lease(update.interval_seconds), max(now - received, 0.0)
        if held >= lease and not update.is_farewell:
            outlived.append(update.agent_id.int)
            continue
        # As it came, with whatever a later version of the contract has in it.
        is_alone = delivery.body[:1] == b"{"
        body = delivery.body if is_alone else encode(update)
        group = update.pool_name, update.is_farewell, lease, int(held / ABREAST_SECONDS)
        alike.setdefault(group, []).append((update.agent_id.int, held, body))
    arrays = [
        _array(relay_key(pool_name, name), lease, is_farewell, part)
        for (pool_name, is_farewell, lease, _), members in alike.items()
        for part in _parts(members)
    ]
    return arrays, outlived


def _parts(
    members: Sequence[tuple[int, float, bytes]],
) -> Iterable[Sequence[tuple[int, float, bytes]]]:
    """Split what is too much for one array."""
    first = size = 0
    for position, (_, _, body) in enumerate(members):
        size += len(body) + 1
        if size + 1 > MAX_ARRAY_BYTES or position - first == MAX_ARRAY_HEARTBEATS:
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
