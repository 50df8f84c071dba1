"""The consumer that records heartbeats: in batches, and acknowledged after the commit.

While one batch commits, the next is read, so batches are small when the fleet is quiet and large
when there is much to do.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial

from prometheus_client import Counter, Histogram

from chiffon.amqp.consumer import Consumer
from chiffon.amqp.dead_letters import DeadLetters
from chiffon.amqp.frames import Delivery
from chiffon.capacity.reservations import left_on
from chiffon.contract.topology import INGEST, ONE_QUEUE, Topology
from chiffon.errors import BusUnavailable, RegistryUnavailable, RowRefused
from chiffon.logs import Trouble
from chiffon.observability.metrics import SECONDS
from chiffon.orchestrator.batch import Batch
from chiffon.orchestrator.duplicate_agents import DuplicateAgents
from chiffon.orchestrator.events import Events
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received, Recorded

log = logging.getLogger(__name__)

COMMITTING = 2
"""Batches in work: while the database commits one, the next is encoded and sent."""

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
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000),
)
COMMIT = Histogram(
    "chiffon_ingest_commit_seconds",
    "Of one statement that commits heartbeats.",
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


class Ingest:
    """Records what a queue of heartbeats holds.

    Args:
        registry: Where heartbeats go.
        events: Publishes agents whose status changed.
        dead_letters: Where refused messages go; never over the connection that consumes, as an
            alarm stops acknowledgements on a connection that publishes.
        canary_keys: Of our own canaries, by which it measures how long messages are on their way.
        queue: Which queue.
        wanted: What it is one queue of.
        batch_size: Messages that are worth a commit at once, and the most rows of one statement.
            Three times as many are prefetched: while two are committed, the next is read.
        batch_seconds: How long a message may wait for others to share its commit.
    """

    def __init__(
        self,
        registry: Registry,
        events: Events,
        dead_letters: DeadLetters,
        *,
        canary_keys: Collection[str] = (),
        queue: str = INGEST,
        wanted: Topology = ONE_QUEUE,
        batch_size: int = 2_000,
        batch_seconds: float = 0.02,
    ) -> None:
        self._registry = registry
        self._events = events
        self._dead_letters = dead_letters
        self.queue = queue
        self._canary_keys = canary_keys
        self._wanted = wanted
        self._batch_size = batch_size
        self._batch_seconds = batch_seconds
        self._consumer: Consumer | None = None
        self._batch = Batch()
        self._in_work = 0
        self._free = asyncio.Semaphore(COMMITTING)
        self._delivered_at = time.monotonic()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._stopping = self._ended = False
        self._duplicates = DuplicateAgents()

    async def attach(self, consumer: Consumer) -> None:
        """Start to consume on a new connection.

        What the last one had delivered and we have not committed is delivered again.
        """
        if self._stopping:
            return
        self._batch = Batch()
        self._consumer, self._delivered_at = consumer, time.monotonic()
        await consumer.consume(
            self.queue,
            prefetch=(COMMITTING + 1) * self._batch_size,
            on_deliveries=partial(self._on_deliveries, consumer),
        )
        log.info("consuming %s", self.queue)

    @property
    def is_attached(self) -> bool:
        """Whether we believe that we are consuming."""
        return not (self._stopping or self._consumer is None or self._consumer.lost.done())

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last delivery, or since the consumer was started."""
        return time.monotonic() - self._delivered_at

    @property
    def may_get_more(self) -> bool:
        """Whether the broker may deliver more before we acknowledge."""
        return self._batch.messages + self._in_work < (COMMITTING + 1) * self._batch_size

    def drop(self, reason: str) -> None:
        """Give the connection up that consumes; another is dialled."""
        if self._consumer is not None:
            self._consumer.drop(reason)

    def _on_deliveries(
        self, consumer: Consumer, deliveries: Sequence[Delivery], received: float
    ) -> None:
        if consumer is not self._consumer:
            return
        self._delivered_at = received
        self._batch.add(deliveries, received)
        self._arrived.set()
        if self._batch.messages >= self._batch_size:
            self._full.set()

    async def run(self) -> None:
        """Commit and acknowledge batches until ``stop`` is called and all is committed."""
        before: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                while not (self._ended and not self._batch.messages):
                    before = await self._next_batch(group, before)
        except* Exception as errors:
            raise errors.exceptions[0] from None

    async def _next_batch(
        self, group: asyncio.TaskGroup, before: asyncio.Task[None] | None
    ) -> asyncio.Task[None] | None:
        await self._arrived.wait()
        if not self._stopping and not self._full.is_set():
            await self._wait_for_more(self._batch.began + self._batch_seconds)
        await self._free.acquire()
        self._arrived.clear()
        self._full.clear()
        batch, self._batch = self._batch, Batch()
        self._in_work += batch.messages
        task = group.create_task(self._finish(batch, self._consumer, before))
        task.add_done_callback(lambda _: self._free.release())
        if self._ended:
            self._arrived.set()
        return task

    async def stop(self) -> None:
        """Stop deliveries; ``run`` ends once what is here is committed."""
        self._stopping = True
        if self._consumer is not None:
            try:
                await self._consumer.cancel()
            except BusUnavailable as error:
                log.debug("%s", error)
        self._ended = True
        self._arrived.set()
        self._full.set()

    async def _wait_for_more(self, until: float) -> None:
        seconds = until - time.monotonic()
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._full.wait()
        except TimeoutError:
            pass

    async def _finish(
        self, batch: Batch, consumer: Consumer | None, before: asyncio.Task[None] | None
    ) -> None:
        try:
            _count(batch)
            recorded: list[Recorded] = []
            left = [one for one, _ in batch.newest.values()]
            await self._until_done(lambda: self._record(left, batch, recorded))
            # All that follows from this batch comes after all that follows from the one before:
            # events, the canary, which proves that what came before it is there, and the
            # acknowledgement.
            if before is not None:
                await before
            for one in recorded:
                await self._report(one)
            for canary in batch.canaries.values():
                await self._until_done(partial(self._mark_path_fresh, *canary))
            await self._acknowledge(batch, consumer)
        finally:
            self._in_work -= batch.messages

    async def _acknowledge(self, batch: Batch, consumer: Consumer | None) -> None:
        """Dead-letter what was refused, and acknowledge the rest."""
        rejected = await self._dead_letter(batch, consumer)
        if consumer is None or consumer is not self._consumer:
            return  # its connection is gone: they are delivered again, and change nothing
        # The broker closes the channel at an acknowledgement of what was rejected already.
        last = next((tag for tag in batch.tags if tag not in rejected), None)
        if last is not None:
            consumer.acknowledge(last)
            consumer.reset_back_off()

    async def _until_done(self, act: Callable[[], Awaitable[None]]) -> None:
        """Do something in the registry, trying again for as long as the database is away."""
        pause, began = FIRST_PAUSE_SECONDS, time.monotonic()
        lasting = Trouble()
        while True:
            try:
                await act()
            except RegistryUnavailable as error:
                if lasting.is_news(str(error)):
                    log.warning("heartbeats wait, trying again: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            else:
                if lasting.is_over():
                    log.warning(
                        "heartbeats are recorded again, after %.1f s", time.monotonic() - began
                    )
                return

    async def _record(self, left: list[Received], batch: Batch, recorded: list[Recorded]) -> None:
        """Record what is left of a batch, and take away from it what is recorded."""
        left.sort(key=lambda one: one.update.agent_id)
        while left:
            part, began = left[: self._batch_size], time.monotonic()
            try:
                recorded.append(await self._registry.heartbeats.record(part))
                BATCH.observe(len(part))
                COMMIT.observe(time.monotonic() - began)
                RECORDED.inc(len(part) - len(recorded[-1].stale))
                del left[: self._batch_size]
            except RowRefused:
                for one in part:
                    await self._record_alone(one, batch, recorded)
                    del left[0]

    async def _record_alone(self, one: Received, batch: Batch, recorded: list[Recorded]) -> None:
        try:
            recorded.append(await self._registry.heartbeats.record([one]))
            RECORDED.inc(1 - len(recorded[-1].stale))
        except RowRefused as error:
            DEAD_LETTERED.inc()
            _, delivery = batch.newest[one.update.agent_id.int]
            batch.refused[delivery.tag] = delivery, f"the database refused it: {error}"

    async def _mark_path_fresh(self, canary: Delivery, received: float) -> None:
        part = self._wanted.proven_by(canary.routing_key, self.queue)
        if part is None:
            return
        published = self._published(canary)
        delay = None if published is None else max(received - published, 0.0)
        await self._registry.path.mark_fresh(received, delay, part=part, path=self._wanted.path)
        CANARIES.inc()
        if published is not None:
            PATH.observe(max(time.monotonic() - published, 0.0))

    def _published(self, canary: Delivery) -> float | None:
        """Return when one of our own canaries was published; ``None`` for another's."""
        if canary.routing_key not in self._canary_keys:
            return None
        try:
            return float(json.loads(canary.body)["published"])
        except (ValueError, KeyError, TypeError):
            return None

    async def _report(self, recorded: Recorded) -> None:
        if recorded.reserved:
            left = left_on(recorded.reserved)
            await self._until_done(lambda: self._registry.heartbeats.write_available(left))
        STALE.inc(len(recorded.stale))
        self._events.transitions(recorded.transitions)
        lower = [
            one
            for one in recorded.stale
            if one.kept_incarnation is not None and one.incarnation < one.kept_incarnation
        ]
        if lower:
            agents = [one.agent_id for one in lower]
            await self._until_done(
                lambda: self._registry.heartbeats.count_lower_incarnations(agents)
            )
            self._duplicates.warn(lower)

    async def _dead_letter(self, batch: Batch, consumer: Consumer | None) -> set[int]:
        """Publish what was refused to the dead letters, each with its reason.

        If one is not confirmed in time, it and the rest are rejected, and the broker dead-letters
        them: without a reason, but heartbeats must not wait for dead letters.

        Returns:
            The delivery tags that were rejected, and so are not to be acknowledged.
        """
        rejected: set[int] = set()
        for tag, (delivery, reason) in batch.refused.items():
            log.warning("dead-lettered a message with key %r: %s", delivery.routing_key, reason)
            if not rejected:
                try:
                    await self._dead_letters.publish(delivery, reason)
                    continue
                except BusUnavailable as error:
                    log.warning("dead letters are not confirmed (%s): rejecting", error)
            if consumer is not None and consumer is self._consumer:
                consumer.reject(tag)
            rejected.add(tag)
        return rejected


def _count(batch: Batch) -> None:
    RECEIVED.inc(batch.heartbeats + len(batch.refused))
    SUPERSEDED.inc(batch.heartbeats - len(batch.newest))
    DEAD_LETTERED.inc(len(batch.refused))
