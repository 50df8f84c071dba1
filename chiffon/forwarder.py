"""What a relay does: takes the heartbeats of many agents, and publishes them as a few arrays.

Agents are told of each heartbeat whether the broker took it, by the confirm of the array that it
went on in. Of several heartbeats of one agent the newest goes on. What waited here is that much
older when it arrives, and what outlived its lease goes nowhere.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from itertools import count

from prometheus_client import Counter

from chiffon.arrays import Array, gathered
from chiffon.bus import Publisher
from chiffon.dead_letters import DeadLetters
from chiffon.encoding import MAX_ARRAY_HEARTBEATS, Refusal
from chiffon.errors import BusUnavailable, NotTaken, Unroutable
from chiffon.frames import Delivery
from chiffon.link import Link
from chiffon.listener import Lane, Listener
from chiffon.messages import CANARY
from chiffon.reading import Reading
from chiffon.topology import HEARTBEATS

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 2.0
"""For an array; with the time that it is gathered, less than the 3 s that an agent waits."""

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
    upto: dict[Lane, int] = field(default_factory=dict)


class Forwarder:
    """Gathers what agents publish, and publishes it.

    Args:
        outgoing: The connection to the broker, for heartbeats alone.
        dead_letters: Where refused messages go, over another connection: if the broker does not
            let us write there, heartbeats must not suffer from it.
        name: Ends the routing keys, for people; ``[A-Za-z0-9_-]{1,64}``.
        seconds: For how long heartbeats are gathered, above 0.
        login: ``user:password`` that agents have to give; ``None`` for whatever they give.
    """

    def __init__(
        self,
        outgoing: Link,
        dead_letters: DeadLetters,
        *,
        name: str,
        seconds: float,
        login: str | None = None,
    ) -> None:
        self.listener = Listener(self._take, login)
        self._outgoing = outgoing
        self._publisher = Publisher(outgoing)
        self._dead_letters = dead_letters
        self._name = name
        self._seconds = seconds
        self._batch = _Batch()
        self._tags = count(1)
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Forward until ``stop``, and then what is still here."""
        while not (self._stopping and not self._batch.upto):
            await self._arrived.wait()
            if not self._stopping:
                await self._wait_for_more()
            self._arrived.clear()
            self._full.clear()
            batch, self._batch = self._batch, _Batch()
            await self._finish(batch)

    def stop(self) -> None:
        """Let ``run`` end once all that came is forwarded."""
        self._stopping = True
        self._arrived.set()
        self._full.set()

    def _take(self, lane: Lane, delivery: Delivery) -> None:
        batch = self._batch
        delivery = delivery._replace(tag=next(self._tags))
        batch.lanes[delivery.tag], batch.upto[lane] = lane, lane.published
        if delivery.header.properties.message_type == CANARY:
            # It proves the way from the broker to the registry, and would prove nothing of ours.
            batch.reading.refuse(
                delivery, [Refusal(delivery.body, "a canary; a relay takes heartbeats alone")]
            )
        else:
            batch.reading.take([delivery], time.monotonic())
        self._arrived.set()
        if len(batch.reading.newest) >= MAX_ARRAY_HEARTBEATS:
            self._full.set()

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._full.wait()
        except TimeoutError:
            pass

    async def _finish(self, batch: _Batch) -> None:
        reading = batch.reading
        RECEIVED.inc(reading.heartbeats + reading.refusals)
        SUPERSEDED.inc(reading.heartbeats - len(reading.newest))
        DEAD_LETTERED.inc(reading.refusals)
        untaken = await asyncio.gather(self._set_aside(reading), self._forward(reading))
        refused = {batch.lanes[tag] for tags in untaken for tag in tags}
        for lane, upto in batch.upto.items():
            lane.settle(upto, is_taken=lane not in refused)

    async def _forward(self, reading: Reading) -> set[int]:
        """Publish what is newest, trying again for as long as the broker is away.

        Returns:
            The tags of the messages that no queue took.
        """
        left, untaken, began = reading.newest, set[int](), time.monotonic()
        while left:
            await self._ready()
            arrays, outlived = gathered(left.values(), self._name, time.monotonic())
            LOST.inc(len(outlived))
            for agent in outlived:
                del left[agent]
            outcomes = await asyncio.gather(*map(self._publish, arrays))
            trouble: BusUnavailable | None = None
            for array, error in zip(arrays, outcomes, strict=True):
                if error is None or isinstance(error, NotTaken | Unroutable):
                    tags = [left.pop(agent)[1].tag for agent in array.agents]
                    untaken.update(tags if error else ())
                    _count(array, error)
                else:
                    trouble = error
            if trouble is not None:
                self._block(str(trouble))
        if self.listener.blocked is not None:
            log.warning("forwarding again, after %.1f s", time.monotonic() - began)
            self.listener.unblock()
        return untaken

    async def _publish(self, array: Array) -> BusUnavailable | None:
        try:
            await self._publisher.publish(
                array.body,
                exchange=HEARTBEATS,
                routing_key=array.routing_key,
                properties=array.properties,
                timeout=CONFIRM_SECONDS,
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

    async def _set_aside(self, reading: Reading) -> set[int]:
        """Publish what was refused to the dead letters; return the tags of what could not be."""
        lost: set[int] = set()
        for tag, (delivery, refusals) in reading.refused.items():
            reason = refusals[0].reason
            log.warning(
                "set aside %d of a message with key %r: %s",
                len(refusals),
                delivery.routing_key,
                reason,
            )
            try:
                if lost:
                    raise BusUnavailable("those before it were not")
                for one in refusals:
                    await self._dead_letters.set_aside(delivery, one)
            except BusUnavailable as error:
                log.warning("dead letters are not confirmed: %s", error)
                lost.add(tag)
        return lost


def _count(array: Array, error: BusUnavailable | None) -> None:
    if error is None:
        ARRAYS.inc()
        FORWARDED.inc(len(array.agents))
    else:
        LOST.inc(len(array.agents))
        log.warning("%d heartbeats are lost: %s", len(array.agents), error)
