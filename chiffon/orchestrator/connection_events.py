"""Agents whose connection closed are hidden from offers at once, where the broker reports it.

RabbitMQ's plugin ``rabbitmq_event_exchange`` publishes ``connection.created`` and
``connection.closed`` on the exchange ``amq.rabbitmq.event`` of its default virtual host; agents
name their connection by their id. A closed connection is no death: the agent may have another, or
dial again. So after a moment in which no other was opened and nothing was heard, the agent is not
offered until it speaks again, and its lease decides whether it is offline. Where there is no such
exchange, or we may not read it, silence is noticed by the lease alone.
"""

import asyncio
import logging
import time
from collections import defaultdict
from uuid import UUID

from aiormq.abc import DeliveredMessage

from chiffon.amqp.connection import Connection, dial_any
from chiffon.amqp.translation import translated
from chiffon.errors import BusRefused, BusUnavailable, TopologyMissing
from chiffon.registry.registry import Registry

log = logging.getLogger(__name__)

EXCHANGE = "amq.rabbitmq.event"
SETTLE_SECONDS = 1.5
"""For an agent to dial again, and for its heartbeat to arrive."""

LOOK_AGAIN_SECONDS = 60.0
REDIAL_SECONDS = 1.0
ANSWER_SECONDS = 5.0


class ConnectionEvents:
    """Follows the broker's events about connections.

    Args:
        url: The broker.
        name: Of our own connection.
        registry: Where agents are hidden.
    """

    def __init__(self, url: str, name: str, registry: Registry) -> None:
        self._url = url
        self._name = name
        self._registry = registry
        self._open: defaultdict[UUID, set[str]] = defaultdict(set)
        self._closed: dict[UUID, float] = {}
        self.is_following = False
        self.due = asyncio.Event()
        """Set when a connection has been closed for long enough to hide its agent."""

    async def hide(self) -> None:
        """Hide the agents whose connection closed and stayed so.

        Raises:
            RegistryUnavailable: The database is away; they are hidden the next time.
        """
        now = time.monotonic()
        closed = {
            agent_id: now - at
            for agent_id, at in self._closed.items()
            if now - at >= SETTLE_SECONDS
        }
        if not closed:
            return
        hidden = await self._registry.sweep.hide_disconnected(list(closed), list(closed.values()))
        for agent_id in closed:
            self._closed.pop(agent_id, None)
        for agent_id, hostname in hidden:
            host = hostname or "host unknown"
            log.info("agent %s (%s) is not offered: its connection closed", agent_id, host)

    async def run(self) -> None:
        """Follow until cancelled; without the plugin, look for it once a minute."""
        logged = False
        while True:
            pause = REDIAL_SECONDS
            try:
                connection = await dial_any(self._url, self._name)
            except BusUnavailable as error:
                log.debug("no events about connections: %s", error)
            else:
                try:
                    await self._follow(connection)
                except (TopologyMissing, BusRefused) as error:
                    pause = LOOK_AGAIN_SECONDS
                    if not logged:
                        log.info("a killed agent is noticed by its lease alone: %s", error)
                    logged = True
                except BusUnavailable as error:
                    log.debug("no events about connections: %s", error)
                finally:
                    self.lost()
                    await connection.close()
            await asyncio.sleep(pause)

    async def _follow(self, connection: Connection) -> None:
        channel = await connection.channel(confirms=False)
        channel.on_consumer_cancel_callbacks.add(
            lambda _: connection.drop("the broker cancelled the consumer of connection events")
        )
        with translated(f"looking for the exchange {EXCHANGE}"):
            await channel.exchange_declare(EXCHANGE, passive=True, timeout=ANSWER_SECONDS)
        with translated("following connections"):
            queue = await channel.queue_declare(
                "", exclusive=True, auto_delete=True, timeout=ANSWER_SECONDS
            )
            for key in ("connection.created", "connection.closed"):
                await channel.queue_bind(str(queue.queue), EXCHANGE, key, timeout=ANSWER_SECONDS)
            await channel.basic_consume(
                str(queue.queue), self._on_event, no_ack=True, timeout=ANSWER_SECONDS
            )
        self.is_following = True
        log.info("agents whose connection closes are hidden from offers at once")
        await connection.lost

    def lost(self) -> None:
        """Note that events are missed: what happens meanwhile is not known, so nothing is."""
        self.is_following = False
        self._open.clear()
        self._closed.clear()

    async def _on_event(self, message: DeliveredMessage) -> None:
        headers = message.header.properties.headers or {}
        try:
            agent_id = UUID(str(headers.get("user_provided_name")))
        except ValueError:
            return  # not an agent
        pid = str(headers.get("pid"))
        if message.routing_key == "connection.created":
            self.opened(agent_id, pid)
        else:
            self.closed(agent_id, pid)

    def opened(self, agent_id: UUID, pid: str) -> None:
        """Note that an agent opened the connection that the broker calls ``pid``."""
        self._open[agent_id].add(pid)
        self._closed.pop(agent_id, None)

    def closed(self, agent_id: UUID, pid: str) -> None:
        """Note that an agent's connection closed; it counts if the agent has no other."""
        self._open[agent_id].discard(pid)
        if self._open[agent_id]:
            return
        del self._open[agent_id]
        self._closed[agent_id] = time.monotonic()
        asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.due.set)
