"""Following events: what changed with agents, pools and reservations."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from aiormq.abc import DeliveredMessage

from chiffon.amqp.connection import Connection
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
from chiffon.errors import BadMessage

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
ANSWER_SECONDS = 5.0
REDIAL_CAP_SECONDS = 5.0

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
    waiting: deque[Event] = deque(maxlen=MOST_WAITING)
    arrived = asyncio.Event()
    keys = ["agent.#", "fleet.#", "reservation.#"] if agent_id is None else [f"agent.{agent_id}.*"]

    async def receive(message: DeliveredMessage) -> None:
        try:
            waiting.append(_read(message))
            arrived.set()
        except BadMessage as error:
            log.warning("an event does not fit: %s", error)

    async def prepare(connection: Connection) -> None:
        await await_exchange(connection, EVENTS)
        channel = await connection.channel(confirms=False)
        channel.on_consumer_cancel_callbacks.add(
            lambda _: connection.drop("the broker cancelled the consumer of events")
        )
        with translated("following events"):
            queue = await channel.queue_declare(
                "",
                exclusive=True,
                auto_delete=True,
                arguments={"x-max-length": MOST_WAITING},
                timeout=ANSWER_SECONDS,
            )
            for key in keys:
                await channel.queue_bind(str(queue.queue), EVENTS, key, timeout=ANSWER_SECONDS)
            await channel.basic_consume(
                str(queue.queue), receive, no_ack=True, timeout=ANSWER_SECONDS
            )
        connection.reset_back_off()

    async def events() -> AsyncIterator[Event]:
        while True:
            await arrived.wait()
            while waiting:
                yield waiting.popleft()
            arrived.clear()

    async with ReconnectingConnection(
        url,
        name=name,
        prepare=prepare,
        redial_cap_seconds=REDIAL_CAP_SECONDS,
        stop_if_refused=True,
    ) as supervised:
        await supervised.connection()
        yield events()


def _read(message: DeliveredMessage) -> Event:
    kind = message.header.properties.message_type
    if kind == AGENT_EVENT:
        return decode(AgentEvent, message.body)
    if kind == FLEET_EVENT:
        return decode(FleetEvent, message.body)
    if kind == RESERVATION_EVENT:
        return decode(ReservationEvent, message.body)
    raise BadMessage(f"type {str(kind)[:64]!r} is none of an event")
