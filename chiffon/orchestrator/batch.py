"""Deliveries to heartbeats: what of a batch is to be recorded, and what is to be dead-lettered.

A batch is read while the one before it is committed, so that of several heartbeats of one agent
only the newest is kept, and of the rest no more than their count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pamqp.header import ContentHeader

from chiffon.amqp.frames import Delivery
from chiffon.amqp.properties import undecodable
from chiffon.contract.codec import decode_heartbeat
from chiffon.contract.messages import CANARY, STATUS_UPDATE
from chiffon.contract.topology import HELD_HEADER
from chiffon.errors import BadMessage
from chiffon.registry.rows import Received

LONGEST_HELD_SECONDS = 30 * 86_400.0


@dataclass(slots=True)
class Batch:
    """One connection's deliveries since the last batch, decoded as they came."""

    messages: int = 0
    heartbeats: int = 0
    began: float = 0.0
    """When the first was received, seconds of ``time.monotonic``."""
    last_tag: int = 0
    newest: dict[int, tuple[Received, Delivery]] = field(default_factory=dict)
    """By the number of the agent's id, which hashes faster than the id."""
    canaries: dict[str, tuple[Delivery, float]] = field(default_factory=dict)
    """The newest by routing key, and when it was received."""
    refused: dict[int, tuple[Delivery, str]] = field(default_factory=dict)
    """By delivery tag: what is to be dead-lettered, and why."""
    _header: ContentHeader | None = None
    _is_canary: bool = False
    _held: float = 0.0

    @property
    def tags(self) -> range:
        """The tags of the deliveries, the newest first: a channel counts them one by one."""
        return range(self.last_tag, self.last_tag - self.messages, -1)

    def add(self, deliveries: Sequence[Delivery], received: float) -> None:
        """Decode what came.

        Args:
            deliveries: In the order in which they came.
            received: When, seconds of ``time.monotonic``.
        """
        for delivery in deliveries:
            try:
                self._add(delivery, received)
            except BadMessage as error:
                self.refused[delivery.tag] = delivery, str(error)
        if not self.messages:
            self.began = received
        self.messages += len(deliveries)
        self.last_tag = deliveries[-1].tag

    def _add(self, delivery: Delivery, received: float) -> None:
        if delivery.header is not self._header:
            self._read_header(delivery.header)
        if self._is_canary:
            self.canaries[delivery.routing_key] = delivery, received
            return
        update = decode_heartbeat(delivery.body, delivery.routing_key)
        self.heartbeats += 1
        kept = self.newest.get(update.agent_id.int)
        if kept is None or kept[0].update.order < update.order:
            one = Received(update, received - self._held)
            self.newest[update.agent_id.int] = one, delivery

    def _read_header(self, header: ContentHeader) -> None:
        """Find out what the messages are that share these properties, as a fleet's do."""
        kind, problem = header.properties.message_type, undecodable(header)
        if kind != CANARY and problem is not None:
            raise BadMessage(problem)
        # A client of the MQTT plugin cannot name a type: on this queue that is a heartbeat.
        if kind not in (CANARY, STATUS_UPDATE, None):
            raise BadMessage(f"type {str(kind)[:64]!r} is not {STATUS_UPDATE}")
        self._header, self._is_canary, self._held = header, kind == CANARY, _held_before(header)


def _held_before(header: ContentHeader) -> float:
    """Return for how many seconds a replayed message had been set aside; 0 for any other."""
    held = (header.properties.headers or {}).get(HELD_HEADER)
    # Bounded, as anybody may write it, and the database has no such interval.
    return min(max(held / 1_000, 0.0), LONGEST_HELD_SECONDS) if isinstance(held, int) else 0.0
