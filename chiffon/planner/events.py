"""Following events: what changed with agents, pools and reservations."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import UUID

from aiormq.abc import DeliveredMessage

from chiffon.amqp.connection import Channel, Connection
from chiffon.amqp.declare import await_exchange
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.amqp.translation import translated
from chiffon.contract.codec import decode
from chiffon.contract.messages import (
    AGENT_EVENT,
    FLEET_EVENT,
    RESERVATION_EVENT,
    AgentEvent,
    FleetEvent,
    ReservationEvent,
)
from chiffon.contract.topology import EVENTS
from chiffon.errors import BadMessage, BusUnavailable

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
ANSWER_SECONDS = 5.0
REDIAL_CAP_SECONDS = 5.0
REBIND_SECONDS = 5.0

Event = AgentEvent | FleetEvent | ReservationEvent


@asynccontextmanager
async def following(
    url: str, *, name: str, agent_id: UUID | None = None
) -> AsyncIterator[AsyncIterator[Event]]:
    """Follow events while the context is open.

    It is entered when events arrive here. While the broker is away none do; those who have to
    know ask then what is true now. A reader that is too slow misses the oldest.

    Args:
        url: The broker; several hosts allowed.
        name: Of the connection.
        agent_id: Only this agent's; default: every agent's, those of pools, and
            those of reservations.

    Raises:
        BadConfiguration: Not an AMQP URL.
        BusRefused: The broker does not let us in.
    """
    followed = _Followed(
        ["agent.#", "fleet.#", "reservation.#"] if agent_id is None else [f"agent.{agent_id}.*"]
    )
    async with ReconnectingConnection(
        url,
        name=name,
        prepare=followed.prepare,
        redial_cap_seconds=REDIAL_CAP_SECONDS,
        stop_if_refused=True,
    ) as supervised:
        await supervised.connection()
        rebinding = asyncio.create_task(followed.rebind(), name="binds the queue of events again")
        try:
            yield followed.events()
        finally:
            rebinding.cancel()


class _Followed:
    """A queue of events, bound by these keys, and what came through it."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._waiting: deque[Event] = deque(maxlen=MOST_WAITING)
        self._arrived = asyncio.Event()
        self._bound: tuple[Channel, str] | None = None

    async def prepare(self, connection: Connection) -> None:
        await await_exchange(connection, EVENTS)
        channel = await connection.channel(confirms=False)
        channel.on_consumer_cancel_callbacks.add(
            lambda _: connection.drop("the broker cancelled the consumer of events")
        )
        with translated("following events"):
            declared = await channel.queue_declare(
                "",
                exclusive=True,
                auto_delete=True,
                arguments={"x-max-length": MOST_WAITING},
                timeout=ANSWER_SECONDS,
            )
            queue = str(declared.queue)
            await self._bind(channel, queue)
            await channel.basic_consume(queue, self._receive, no_ack=True, timeout=ANSWER_SECONDS)
        connection.reset_back_off()
        self._bound = channel, queue

    async def rebind(self) -> None:
        """Bind again and again: an exchange that was deleted took the bindings with it."""
        while True:
            await asyncio.sleep(REBIND_SECONDS)
            if self._bound is not None and not self._bound[0].is_closed:
                with suppress(BusUnavailable), translated("following events"):
                    await self._bind(*self._bound)

    async def events(self) -> AsyncIterator[Event]:
        while True:
            await self._arrived.wait()
            while self._waiting:
                yield self._waiting.popleft()
            self._arrived.clear()

    async def _bind(self, channel: Channel, queue: str) -> None:
        for key in self._keys:
            await channel.queue_bind(queue, EVENTS, key, timeout=ANSWER_SECONDS)

    async def _receive(self, message: DeliveredMessage) -> None:
        try:
            self._waiting.append(_read(message))
            self._arrived.set()
        except BadMessage as error:
            log.warning("an event does not fit: %s", error)


def _read(message: DeliveredMessage) -> Event:
    kind = message.header.properties.message_type
    if kind == AGENT_EVENT:
        return decode(AgentEvent, message.body)
    if kind == FLEET_EVENT:
        return decode(FleetEvent, message.body)
    if kind == RESERVATION_EVENT:
        return decode(ReservationEvent, message.body)
    raise BadMessage(f"type {str(kind)[:64]!r} is none of an event")
