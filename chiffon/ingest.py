"""The consumer that records heartbeats: in batches, and acknowledged after the commit.

Deliveries only go into a buffer; the database work is done by a task of its own, since the
library cancels its callbacks when a channel closes. While one batch commits, the next gathers,
so batches are small when the fleet is quiet and large when there is much to do.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from aiormq.abc import DeliveredMessage
from prometheus_client import Counter, Histogram

from chiffon import liveness
from chiffon.bus import acknowledge, reject
from chiffon.dead_letters import DeadLetters
from chiffon.decoding import undecodable
from chiffon.encoding import Refusal, decode_heartbeats, encode
from chiffon.errors import BadMessage, BusUnavailable, RegistryUnavailable, RowRefused
from chiffon.events import Events
from chiffon.messages import CANARY, STATUS_UPDATE, StatusUpdate
from chiffon.metrics import SECONDS
from chiffon.registry import Receipt, Recorded, Registry, Stale
from chiffon.session import Channel, Session, translated
from chiffon.topology import HELD_HEADER, INGEST

log = logging.getLogger(__name__)

CANCEL_SECONDS = 2.0
LONGEST_HELD_SECONDS = 30 * 86_400.0
FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
"""Between two tries to commit while the database is away."""


# Each heartbeat that is received ends as one of the other four. One that is delivered again, as it
# was not acknowledged, is received again; of a batch that had to be tried again after a part of it
# was recorded, that part is stale as well.
RECEIVED = Counter("chiffon_heartbeats_received", "Heartbeats taken from the queue.")
RECORDED = Counter("chiffon_heartbeats_recorded", "Heartbeats that are in the registry.")
SUPERSEDED = Counter(
    "chiffon_heartbeats_superseded", "Heartbeats passed over for a newer one of the same batch."
)
STALE = Counter(
    "chiffon_heartbeats_stale",
    "Heartbeats that changed nothing: older than the row, or held here for longer than a lease.",
)
DEAD_LETTERED = Counter(
    "chiffon_heartbeats_dead_lettered",
    "Heartbeats set aside; a body that nobody can read counts as one.",
)
BATCH = Histogram(
    "chiffon_ingest_batch_heartbeats",
    "Heartbeats in one commit.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000),
)
COMMIT = Histogram(
    "chiffon_ingest_commit_seconds",
    "From the first try to commit a batch to the commit that holds it.",
    buckets=SECONDS,
)
CANARIES = Counter(
    "chiffon_canaries_recorded", "Canaries that went the whole way, of any orchestrator."
)
PATH = Histogram(
    "chiffon_ingest_path_seconds",
    "From the publishing of this process's own canaries to their commit, on one clock.",
    buckets=SECONDS,
)


@dataclass(frozen=True, slots=True)
class _Delivery:
    """A message as it came, and when: seconds on the monotonic clock."""

    message: DeliveredMessage
    received: float


@dataclass(slots=True)
class _Reading:
    """A batch, read: what is to be recorded, and what is to be set aside."""

    newest: dict[UUID, tuple[StatusUpdate, _Delivery]] = field(default_factory=dict)
    heartbeats: int = 0
    canary: _Delivery | None = None
    refused: dict[int, tuple[DeliveredMessage, list[Refusal]]] = field(default_factory=dict)
    """By delivery tag: what of a message is to be set aside."""

    def add(self, update: StatusUpdate, delivery: _Delivery) -> None:
        self.heartbeats += 1
        kept = self.newest.get(update.agent_id)
        if kept is None or kept[0].order < update.order:
            self.newest[update.agent_id] = (update, delivery)

    def refuse(self, message: DeliveredMessage, refusals: Iterable[Refusal]) -> None:
        _, known = self.refused.setdefault(message.delivery_tag or 0, (message, []))
        known.extend(refusals)

    def count(self) -> None:
        """Count what was received, and what needs no database."""
        refused = sum(len(refusals) for _, refusals in self.refused.values())
        RECEIVED.inc(self.heartbeats + refused)
        DEAD_LETTERED.inc(refused)
        SUPERSEDED.inc(self.heartbeats - len(self.newest))

    def receipts(self) -> list[Receipt]:
        """Return what is to be recorded, in the order of the agents' ids."""
        return [
            Receipt(update, delivery.received)
            for _, (update, delivery) in sorted(self.newest.items())
        ]


class _Rivals:
    """Agents of whose earlier start heartbeats keep coming: two processes use one id."""

    def __init__(self) -> None:
        self._seen: dict[UUID, int] = {}
        self._named: dict[UUID, float] = {}

    def tell(self, stale: Iterable[Stale]) -> None:
        """Name those of which it was not the first time, each at most once a minute."""
        now = time.monotonic()
        for one in stale:
            # The first few may be what was in the queue when the agent was started anew.
            self._seen[one.agent_id] = self._seen.get(one.agent_id, 0) + 1
            is_kept_up = self._seen[one.agent_id] >= liveness.MISSED_HEARTBEATS
            if not is_kept_up or now - self._named.get(one.agent_id, -60.0) < 60.0:
                continue
            self._named[one.agent_id] = now
            log.warning(
                "agent %s sends heartbeats of an earlier start (%d, the registry has %d): a "
                "cloned disk, or a clock set back; mend: `chiffon fleet forget %s`",
                one.agent_id,
                one.incarnation,
                one.kept_incarnation,
                one.agent_id,
            )


class Ingest:
    """Records what the queue ``chiffon.ingest`` holds.

    Args:
        registry: Where heartbeats go.
        events: Who is told of agents whose status changed.
        dead_letters: Where refused messages go; never over the connection that consumes, as an
            alarm stops acknowledgements on a connection that publishes.
        canary_key: Of our own canaries, which tell how long messages are on their way.
        batch_size: The most messages in one commit; twice as many are prefetched.
        batch_seconds: How long a message may wait for others to share its commit.
    """

    def __init__(
        self,
        registry: Registry,
        events: Events,
        dead_letters: DeadLetters,
        *,
        canary_key: str = "",
        batch_size: int = 500,
        batch_seconds: float = 0.02,
    ) -> None:
        self._registry = registry
        self._events = events
        self._dead_letters = dead_letters
        self._canary_key = canary_key
        self._batch_size = batch_size
        self._batch_seconds = batch_seconds
        self._session: Session | None = None
        self._channel: Channel | None = None
        self._consumer_tag: str | None = None
        self._works: Callable[[], None] = lambda: None
        self._buffer: list[_Delivery] = []
        self._in_work = 0
        self._heard = time.monotonic()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._stopping = False
        self._rivals = _Rivals()

    async def attach(self, session: Session) -> None:
        """Start to consume on a new connection.

        What the last one had delivered and we have not committed is delivered again.
        """
        self._channel = None
        self._buffer.clear()
        channel = await session.channel(confirms=False, prefetch=2 * self._batch_size)
        channel.on_consumer_cancel_callbacks.add(
            lambda _: session.drop(f"the broker cancelled the consumer of {INGEST}")
        )
        self._channel = channel
        self._works = session.works
        with translated(f"consuming {INGEST}"):
            answer = await channel.basic_consume(INGEST, self._on_delivery)
        self._consumer_tag = answer.consumer_tag
        self._session, self._heard = session, time.monotonic()
        log.info("consuming %s", INGEST)

    @property
    def is_attached(self) -> bool:
        """Whether we believe that we are consuming."""
        return not (self._stopping or self._session is None or self._session.lost.done())

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last delivery, or since the consumer was started."""
        return time.monotonic() - self._heard

    @property
    def has_room(self) -> bool:
        """Whether the broker may deliver more before we acknowledge."""
        return len(self._buffer) + self._in_work < 2 * self._batch_size

    def drop(self, reason: str) -> None:
        """Give the connection up that consumes; another is dialled."""
        if self._session is not None:
            self._session.drop(reason)

    async def _on_delivery(self, message: DeliveredMessage) -> None:
        self._heard = time.monotonic()
        self._buffer.append(_Delivery(message, self._heard - _held_before(message)))
        self._arrived.set()
        if len(self._buffer) >= self._batch_size:
            self._full.set()

    async def run(self) -> None:
        """Commit and acknowledge batches until ``stop`` is called and the buffer is empty."""
        while True:
            await self._arrived.wait()
            if not self._stopping and len(self._buffer) < self._batch_size:
                await self._wait_for_more()
            batch, self._buffer = (
                self._buffer[: self._batch_size],
                self._buffer[self._batch_size :],
            )
            if batch:
                self._in_work = len(batch)
                await self._take(batch)
                self._in_work = 0
            if not self._buffer:
                if self._stopping:
                    return
                self._arrived.clear()
            if len(self._buffer) < self._batch_size:
                self._full.clear()

    async def stop(self) -> None:
        """Take no more deliveries; ``run`` ends once what is here is committed."""
        self._stopping = True
        if self._channel is not None and self._consumer_tag is not None:
            try:
                with translated("ending the consumer"):
                    await self._channel.basic_cancel(self._consumer_tag, timeout=CANCEL_SECONDS)
            except BusUnavailable as error:
                log.debug("%s", error)
        self._arrived.set()
        self._full.set()

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout(self._batch_seconds):
                await self._full.wait()
        except TimeoutError:
            pass

    async def _take(self, batch: Sequence[_Delivery]) -> None:
        reading = _read(batch)
        reading.count()
        await self._commit(reading)
        rejected = await self._set_aside(reading)
        # The broker closes the channel at an acknowledgement of what was rejected already.
        taken = [one.message for one in batch if one.message.delivery_tag not in rejected]
        if taken:
            await self._acknowledge(taken[-1])

    async def _commit(self, reading: _Reading) -> None:
        """Record a batch, trying again for as long as the database is away."""
        pause, began = FIRST_PAUSE_SECONDS, time.monotonic()
        trouble: str | None = None
        is_recorded = False
        while True:
            try:
                if reading.newest and not is_recorded:
                    await self._record(reading)
                    is_recorded = True
                    COMMIT.observe(time.monotonic() - began)
                if reading.canary is not None:
                    await self._mark_path_fresh(reading.canary)
            except RegistryUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("heartbeats wait, trying again: %s", trouble)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            else:
                if trouble is not None:
                    log.warning(
                        "heartbeats are recorded again, after %.1f s", time.monotonic() - began
                    )
                return

    async def _record(self, reading: _Reading) -> None:
        receipts = reading.receipts()
        try:
            await self._report(await self._registry.record(receipts), len(receipts))
        except RowRefused:
            for receipt in receipts:
                await self._record_alone(receipt, reading)

    async def _record_alone(self, receipt: Receipt, reading: _Reading) -> None:
        try:
            await self._report(await self._registry.record([receipt]), 1)
        except RowRefused as error:
            DEAD_LETTERED.inc()
            update, delivery = reading.newest.pop(receipt.update.agent_id)
            refusal = Refusal(encode(update), f"the database refused it: {error}")
            reading.refuse(delivery.message, [refusal])

    async def _mark_path_fresh(self, canary: _Delivery) -> None:
        published = self._published(canary)
        delay = None if published is None else max(canary.received - published, 0.0)
        await self._registry.mark_path_fresh(canary.received, delay)
        CANARIES.inc()
        if published is not None:
            PATH.observe(max(time.monotonic() - published, 0.0))

    def _published(self, canary: _Delivery) -> float | None:
        """Return when one of our own canaries was published; ``None`` for another's."""
        if canary.message.routing_key != self._canary_key:
            return None
        try:
            return float(json.loads(canary.message.body)["published"])
        except (ValueError, KeyError, TypeError):
            return None

    async def _report(self, recorded: Recorded, count: int) -> None:
        STALE.inc(len(recorded.stale))
        RECORDED.inc(count - len(recorded.stale))
        BATCH.observe(count)
        self._events.transitions(recorded.transitions)
        lower = [
            one
            for one in recorded.stale
            if one.kept_incarnation is not None and one.incarnation < one.kept_incarnation
        ]
        if lower:
            await self._registry.count_lower_incarnations([one.agent_id for one in lower])
            self._rivals.tell(lower)

    async def _set_aside(self, reading: _Reading) -> set[int]:
        """Publish what was refused to the dead letters, each with its reason.

        If one is not confirmed in time, the broker is told to set that message and the rest of
        them aside itself: it cannot be told why, but heartbeats must not wait for dead letters.
        What of a message was good has been recorded, and is unchanged by a replay.

        Returns:
            The delivery tags that were rejected, and so are not to be acknowledged.
        """
        rejected: set[int] = set()
        for tag, (message, refusals) in reading.refused.items():
            key, reason = message.routing_key, refusals[0].reason
            log.warning("set aside %d of a message with key %r: %s", len(refusals), key, reason)
            if not rejected:
                try:
                    await asyncio.gather(
                        *(self._dead_letters.set_aside(message, one) for one in refusals)
                    )
                    continue
                except BusUnavailable as error:
                    log.warning("dead letters are not confirmed (%s): rejecting", error)
            await self._reject(message)
            rejected.add(tag)
        return rejected

    async def _reject(self, message: DeliveredMessage) -> None:
        if message.channel is self._channel:  # else it is delivered, and refused, again
            try:
                await reject(message)
            except BusUnavailable as error:
                log.debug("%s", error)

    async def _acknowledge(self, last: DeliveredMessage) -> None:
        if last.channel is not self._channel:
            return  # its connection is gone: it is delivered again, and changes nothing
        try:
            await acknowledge(last, multiple=True)
            self._works()
        except BusUnavailable as error:
            log.debug("%s", error)


def _held_before(message: DeliveredMessage) -> float:
    """Return for how many seconds a replayed message had been set aside; 0 for any other."""
    held = (message.header.properties.headers or {}).get(HELD_HEADER)
    # Bounded, as anybody may write it, and the database has no such interval.
    return min(max(held / 1_000, 0.0), LONGEST_HELD_SECONDS) if isinstance(held, int) else 0.0


def _read(batch: Sequence[_Delivery]) -> _Reading:
    reading = _Reading()
    for delivery in batch:
        message = delivery.message
        kind = message.header.properties.message_type
        if kind == CANARY:
            reading.canary = delivery
            continue
        try:
            problem = undecodable(message.header)
            if problem is not None:
                raise BadMessage(problem)
            if kind != STATUS_UPDATE:
                raise BadMessage(f"type {str(kind)[:64]!r} is not {STATUS_UPDATE}")
            updates, refusals = decode_heartbeats(message.body, message.routing_key or "")
        except BadMessage as error:
            reading.refuse(message, [Refusal(message.body, str(error))])
            continue
        for update in updates:
            reading.add(update, delivery)
        if refusals:
            reading.refuse(message, refusals)
    return reading
