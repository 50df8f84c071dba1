"""Publishing what changed with agents, pools and reservations.

An event is published after the commit that it reports. It is a hint, not a record: while the
broker is away the newest wait here, up to a bound, and those of an orchestrator that is killed
are lost. What is true stands in the registry.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from chiffon.amqp.publisher import Properties, Publisher
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.codec import encode
from chiffon.contract.messages import (
    AGENT_EVENT,
    FLEET_EVENT,
    RESERVATION_EVENT,
    AgentEvent,
    FleetEvent,
    Reservation,
    ReservationEvent,
)
from chiffon.contract.topology import EVENTS
from chiffon.errors import BusUnavailable
from chiffon.registry.rows import Transition

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
CONFIRM_SECONDS = 2.0
PUBLISHED_AT_ONCE = 100

Event = AgentEvent | FleetEvent | ReservationEvent

_TYPES: dict[type, str] = {
    AgentEvent: AGENT_EVENT,
    FleetEvent: FLEET_EVENT,
    ReservationEvent: RESERVATION_EVENT,
}


class Events:
    """Publishes events in the order in which they come.

    Args:
        supervised: The connection to publish on.
    """

    def __init__(self, supervised: ReconnectingConnection) -> None:
        self._publisher = Publisher(supervised)
        self._waiting: deque[Event] = deque(maxlen=MOST_WAITING)
        self._added = asyncio.Event()

    def transitions(self, transitions: Iterable[Transition]) -> None:
        """Publish, soon, agents whose status changed."""
        now = datetime.now(UTC)
        self._add(
            AgentEvent(
                agent_id=one.agent_id,
                pool_name=one.pool_name,
                hostname=one.hostname,
                status=one.status,
                reason=one.reason,
                at=now,
            )
            for one in transitions
        )

    def pools(self, state: Literal["degraded", "recovered"], pool_names: Iterable[str]) -> None:
        """Publish, soon, pools in which most became silent at once, or speak again."""
        now = datetime.now(UTC)
        self._add(FleetEvent(state=state, pool_name=name, at=now) for name in pool_names)

    def reservations(self, ended: Iterable[Reservation]) -> None:
        """Publish, soon, reservations that were ended by us."""
        now = datetime.now(UTC)
        self._add(
            ReservationEvent(
                reservation_id=one.reservation_id,
                holder=one.holder,
                agent_ids=[place.agent_id for place in one.places],
                fence=one.fence,
                state=one.state,
                reason=one.reason,
                at=now,
            )
            for one in ended
        )

    def _add(self, events: Iterable[Event]) -> None:
        before = len(self._waiting)
        self._waiting.extend(events)
        if before < MOST_WAITING == len(self._waiting):
            log.warning("more than %d events wait: the oldest are dropped", MOST_WAITING)
        self._added.set()

    async def run(self) -> None:
        """Publish until cancelled; a broker that is away is waited for."""
        while True:
            await self._added.wait()
            self._added.clear()
            while self._waiting:
                batch = [
                    self._waiting.popleft()
                    for _ in range(min(PUBLISHED_AT_ONCE, len(self._waiting)))
                ]
                try:
                    await asyncio.gather(*(self._publish(event) for event in batch))
                except BusUnavailable as error:
                    log.debug("events wait: %s", error)
                    # Some of them may have gone out: better twice than not at all. If more came
                    # meanwhile than there is room for, these are the oldest, and go.
                    room = MOST_WAITING - len(self._waiting)
                    self._waiting.extendleft(reversed(batch[max(len(batch) - room, 0) :]))
                    await asyncio.sleep(CONFIRM_SECONDS)

    async def _publish(self, event: Event) -> None:
        await self._publisher.publish(
            encode(event),
            exchange=EVENTS,
            routing_key=event.routing_key,
            properties=Properties(
                message_type=_TYPES[type(event)],
                content_type="application/json",
                delivery_mode=1,
            ),
            timeout=CONFIRM_SECONDS,
            mandatory=False,
        )
