"""Deliveries to heartbeats: what of a batch is to be recorded, and what is to be set aside.

A batch is read while the one before it is committed, so that of several heartbeats of one agent
only the newest is kept, and of the rest no more than its count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pamqp.header import ContentHeader

from chiffon.decoding import undecodable
from chiffon.encoding import Refusal, decode_heartbeats
from chiffon.errors import BadMessage
from chiffon.frames import Delivery
from chiffon.messages import CANARY, STATUS_UPDATE
from chiffon.receipt import Receipt
from chiffon.topology import HELD_HEADER

LONGEST_HELD_SECONDS = 30 * 86_400.0


@dataclass(slots=True)
class Reading:
    """One connection's deliveries since the last batch, read as they came."""

    messages: int = 0
    heartbeats: int = 0
    began: float = 0.0
    """When the first was received, seconds of ``time.monotonic``."""
    last_tag: int = 0
    newest: dict[int, tuple[Receipt, Delivery]] = field(default_factory=dict)
    """By the number of the agent's id, which hashes faster than the id."""
    canaries: dict[str, tuple[Delivery, float]] = field(default_factory=dict)
    """The newest by routing key, and when it was received."""
    refused: dict[int, tuple[Delivery, list[Refusal]]] = field(default_factory=dict)
    """By delivery tag: what of a message is to be set aside."""
    _header: ContentHeader | None = None
    _kind: str | None = None
    _held: float = 0.0

    @property
    def tags(self) -> range:
        """The tags of the deliveries, the newest first: a channel counts them one by one."""
        return range(self.last_tag, self.last_tag - self.messages, -1)

    @property
    def refusals(self) -> int:
        """How many heartbeats are to be set aside; a body that nobody can read counts as one."""
        return sum(len(refusals) for _, refusals in self.refused.values())

    def take(self, deliveries: Sequence[Delivery], received: float) -> None:
        """Read what came.

        Args:
            deliveries: In the order in which they came.
            received: When, seconds of ``time.monotonic``.
        """
        for delivery in deliveries:
            try:
                self._read(delivery, received)
            except BadMessage as error:
                self.refuse(delivery, [Refusal(delivery.body, str(error))])
        if not self.messages:
            self.began = received
        self.messages += len(deliveries)
        self.last_tag = deliveries[-1].tag

    def refuse(self, delivery: Delivery, refusals: Iterable[Refusal]) -> None:
        """Note what of a message is to be set aside."""
        _, known = self.refused.setdefault(delivery.tag, (delivery, []))
        known.extend(refusals)

    def _read(self, delivery: Delivery, received: float) -> None:
        if delivery.header is not self._header:
            self._look(delivery.header)
        if self._kind == CANARY:
            self.canaries[delivery.routing_key] = delivery, received
            return
        updates, refusals = decode_heartbeats(delivery.body, delivery.routing_key)
        for update in updates:
            self._keep(Receipt(update, received - self._held), delivery)
        if refusals:
            self.refuse(delivery, refusals)

    def _look(self, header: ContentHeader) -> None:
        """Find out what the messages are that share these properties, as a fleet's do."""
        kind = header.properties.message_type
        problem = undecodable(header)
        if kind != CANARY and problem is not None:
            raise BadMessage(problem)
        if kind not in (CANARY, STATUS_UPDATE):
            raise BadMessage(f"type {str(kind)[:64]!r} is not {STATUS_UPDATE}")
        self._header, self._kind, self._held = header, kind, _held_before(header)

    def _keep(self, receipt: Receipt, delivery: Delivery) -> None:
        self.heartbeats += 1
        number = receipt.update.agent_id.int
        kept = self.newest.get(number)
        if kept is None or kept[0].update.order < receipt.update.order:
            self.newest[number] = (receipt, delivery)


def _held_before(header: ContentHeader) -> float:
    """Return for how many seconds a replayed message had been set aside; 0 for any other."""
    held = (header.properties.headers or {}).get(HELD_HEADER)
    # Bounded, as anybody may write it, and the database has no such interval.
    return min(max(held / 1_000, 0.0), LONGEST_HELD_SECONDS) if isinstance(held, int) else 0.0
