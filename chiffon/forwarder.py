"""What a relay does: takes the heartbeats of many agents, and publishes them as a few arrays.

Agents are told of each heartbeat whether the broker took it, by the confirm of the array that it
went on in. Of several heartbeats of one agent the newest goes on. What waited here is that much
older when it arrives, and what outlived its lease goes nowhere.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from prometheus_client import Counter

from chiffon.arrays import Array, gathered
from chiffon.bus import Publisher
from chiffon.encoding import MAX_ARRAY_HEARTBEATS, Refusal
from chiffon.errors import BusRefused, BusUnavailable, NotTaken, TopologyMismatch, Unroutable
from chiffon.frames import Delivery
from chiffon.guest import Lane
from chiffon.letters import Letters
from chiffon.link import Link
from chiffon.listener import Listener
from chiffon.messages import CANARY
from chiffon.reading import Reading
from chiffon.receipt import Receipt
from chiffon.topology import HEARTBEATS

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 2.0
"""For an array; with the time that it is gathered, less than the 3 s that an agent waits."""

PATIENT_SECONDS = 30.0
"""For an array while agents are told to wait: over a slow line a large one takes its time."""

AT_ONCE = 4
"""Batches in work: over a long line the next is published while the last is on its way."""

MOST_AGENTS = 100_000
"""That are held while the broker is away; who brings more is cut off."""

_FINAL = (NotTaken, Unroutable, BusRefused, TopologyMismatch)
"""What another try would not mend."""

_RESOURCE_ERROR = 506

# Each heartbeat that is received ends as one of the other four, or is still here.
RECEIVED = Counter("chiffon_relay_heartbeats_received", "Heartbeats that agents published.")
FORWARDED = Counter("chiffon_relay_heartbeats_forwarded", "Heartbeats that the broker took.")
SUPERSEDED = Counter(
    "chiffon_relay_heartbeats_superseded", "Heartbeats passed over for a newer one of the agent."
)
LOST = Counter(
    "chiffon_relay_heartbeats_lost",
    "Heartbeats that outlived their lease here, or that the broker's queue did not take.",
)
DEAD_LETTERED = Counter("chiffon_relay_heartbeats_dead_lettered", "Heartbeats set aside.")
ARRAYS = Counter("chiffon_relay_arrays_published", "Messages that carried them.")


@dataclass(slots=True)
class _Batch:
    """What came since the last one, and whom to tell what became of it."""

    reading: Reading = field(default_factory=Reading)
    lanes: dict[int, Lane] = field(default_factory=dict)
    """By the tags of the messages in ``reading``."""
    upto: dict[Lane, tuple[int, int]] = field(default_factory=dict)
    """How much of each channel is in it or was before: messages and bytes."""
    refused: set[Lane] = field(default_factory=set)


class Forwarder:
    """Gathers what agents publish, and publishes it.

    Args:
        outgoing: The connection to the broker, for heartbeats alone.
        letters: Where refused messages go.
        name: Ends the routing keys, for people; ``[A-Za-z0-9_-]{1,64}``.
        seconds: For how long heartbeats are gathered, above 0.
        login: ``user:password`` that agents have to give; ``None`` for whatever they give.
    """

    def __init__(
        self,
        outgoing: Link,
        letters: Letters,
        *,
        name: str,
        seconds: float,
        login: str | None = None,
    ) -> None:
        self.listener = Listener(self._take, login)
        self._outgoing = outgoing
        self._publisher = Publisher(outgoing)
        self._letters = letters
        self._name = name
        self._seconds = seconds
        self._batch = _Batch()
        self._tags = count(1)
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._free = asyncio.Semaphore(AT_ONCE)
        self._stopping = False

    async def run(self) -> None:
        """Forward until ``stop``, and then what is still here."""
        before: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                while not (self._stopping and not self._batch.upto):
                    await self._arrived.wait()
                    if not self._stopping:
                        await self._wait_for_more()
                    await self._free.acquire()
                    self._arrived.clear()
                    self._full.clear()
                    batch, self._batch = self._batch, _Batch()
                    before = group.create_task(self._finish(batch, before))
                    before.add_done_callback(lambda _: self._free.release())
                    if self._stopping:
                        self._arrived.set()
        except* Exception as errors:
            raise errors.exceptions[0] from None

    def stop(self) -> None:
        """Let ``run`` end once all that came is forwarded."""
        self._stopping = True
        self._arrived.set()
        self._full.set()

    def _take(self, lane: Lane, delivery: Delivery) -> None:
        batch = self._batch
        reading, delivery = batch.reading, delivery._replace(tag=next(self._tags))
        batch.upto[lane] = lane.published, lane.bytes_published
        if delivery.header.properties.message_type == CANARY:
            # It proves the way from the broker to the registry, and would prove nothing of ours.
            reading.refuse(delivery, [Refusal(delivery.body, "a relay takes no canaries")])
        else:
            batch.lanes[delivery.tag] = lane
            reading.take([delivery], time.monotonic())
        if reading.refused:
            self._refuse(batch, lane)
        self._arrived.set()
        if len(reading.newest) >= MAX_ARRAY_HEARTBEATS:
            self._full.set()
        if len(reading.newest) > MOST_AGENTS:
            lane.guest.close(_RESOURCE_ERROR, "RESOURCE_ERROR - the relay holds too many agents")

    def _refuse(self, batch: _Batch, lane: Lane) -> None:
        """Hand on what cannot be read; its sender is told that it was not taken."""
        batch.refused.add(lane)
        refused, batch.reading.refused = batch.reading.refused, {}
        for delivery, refusals in refused.values():
            DEAD_LETTERED.inc(len(refusals))
            RECEIVED.inc(len(refusals))
            for one in refusals:
                self._letters.add(delivery, one)

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._full.wait()
        except TimeoutError:
            pass

    async def _finish(self, batch: _Batch, before: asyncio.Task[None] | None) -> None:
        reading = batch.reading
        RECEIVED.inc(reading.heartbeats)
        SUPERSEDED.inc(reading.heartbeats - len(reading.newest))
        untaken = await self._forward(reading)
        if before is not None:
            await before  # a confirm is for all that came before on its channel, too
        refused = batch.refused | {batch.lanes[tag] for tag in untaken}
        for lane, upto in batch.upto.items():
            lane.settle(*upto, is_taken=lane not in refused)

    async def _forward(self, reading: Reading) -> list[int]:
        """Publish what is newest, trying again for as long as the broker is away.

        Returns:
            The tags of the messages that go nowhere.
        """
        left, untaken, began = reading.newest, list[int](), time.monotonic()
        while left:
            await self._ready()
            arrays, dropped = gathered(left.values(), self._name, time.monotonic())
            LOST.inc(len(dropped))
            untaken += [left.pop(agent)[1].tag for agent in dropped]
            # One by one over a line that could not take all at once.
            at_once = 1 if self.listener.blocked is not None else max(len(arrays), 1)
            for first in range(0, len(arrays), at_once):
                some = arrays[first : first + at_once]
                outcomes = await asyncio.gather(*map(self._publish, some))
                untaken += self._judge(some, outcomes, left)
        if self.listener.blocked is not None:
            log.warning("forwarding again, after %.1f s", time.monotonic() - began)
            self.listener.unblock()
        return untaken

    def _judge(
        self,
        arrays: Sequence[Array],
        outcomes: Sequence[BusUnavailable | None],
        left: dict[int, tuple[Receipt, Delivery]],
    ) -> list[int]:
        """Take away what needs not be published again; return the tags of what no queue took."""
        untaken: list[int] = []
        for array, error in zip(arrays, outcomes, strict=True):
            if error is not None and not isinstance(error, _FINAL):
                self._block(str(error))
                continue
            tags = [left.pop(agent)[1].tag for agent in array.agents]
            if error is None:
                ARRAYS.inc()
                FORWARDED.inc(len(tags))
                continue
            untaken += tags
            LOST.inc(len(tags))
            log.warning("%d heartbeats are lost: %s", len(tags), error)
        return untaken

    async def _publish(self, array: Array) -> BusUnavailable | None:
        try:
            await self._publisher.publish(
                array.body,
                exchange=HEARTBEATS,
                routing_key=array.routing_key,
                properties=array.properties,
                timeout=PATIENT_SECONDS if self.listener.blocked else CONFIRM_SECONDS,
            )
        except BusUnavailable as error:
            return error
        self._outgoing.works()
        return None

    async def _ready(self) -> None:
        """Wait until the broker may be written to."""
        if self._outgoing.current is None:
            # Before agents give their own connection up, for want of a confirm.
            self._block(self._outgoing.trouble)
        session = await self._outgoing.session()
        await session.unblocked()

    def _block(self, trouble: str) -> None:
        if self.listener.blocked is None:
            log.warning("heartbeats wait, trying again: %s", trouble)
            self.listener.block(f"the relay cannot reach its broker: {trouble}")
