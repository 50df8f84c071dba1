"""Agents whose connection closed, known at once where the broker tells of it.

RabbitMQ's plugin ``rabbitmq_event_exchange`` publishes ``connection.created`` and
``connection.closed`` on the exchange ``amq.rabbitmq.event`` of its default virtual host; agents
name their connection by their id. A closed connection alone is no death: the agent may have
another, or dial again. So a closing counts only after a while in which no connection of that name
was opened and nothing was heard, and the sweep, which knows the rest and sees when many closed at
once, has the last word. Where there is no such exchange, or we may not read it, silence is noticed
by the lease alone.
"""

import asyncio
import logging
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from uuid import UUID

from aiormq.abc import DeliveredMessage

from chiffon.errors import BusRefused, BusUnavailable, TopologyMissing
from chiffon.liveness import BURST_SECONDS
from chiffon.registry import Closing
from chiffon.session import Session, dial_any, translated

log = logging.getLogger(__name__)

EXCHANGE = "amq.rabbitmq.event"
SETTLE_SECONDS = 1.5
"""For an agent to dial again, and for its heartbeat to arrive."""

FORGET_SECONDS = 60.0
LOOK_AGAIN_SECONDS = 60.0
REDIAL_SECONDS = 1.0
ANSWER_SECONDS = 5.0


@dataclass(slots=True)
class _Closed:
    at: float
    is_known: bool
    is_line: bool


class Closings:
    """Follows the broker's events about connections.

    Args:
        url: The broker.
        name: Of our own connection.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name
        self._open: defaultdict[UUID, set[str]] = defaultdict(set)
        self._closed: dict[UUID, _Closed] = {}
        self._was_lost = False
        self._doubted_until = -math.inf
        self.is_following = False
        self.due = asyncio.Event()
        """Set when a closing has settled, so that the sweep need not wait for its turn."""

    def current(self) -> list[Closing]:
        """Return the closings of the last minute, each agent's last."""
        now = time.monotonic()
        old = [agent for agent, one in self._closed.items() if now - one.at > FORGET_SECONDS]
        for agent_id in old:
            del self._closed[agent_id]
        return [
            Closing(agent_id, now - one.at, one.is_known, one.is_line)
            for agent_id, one in self._closed.items()
        ]

    async def run(self) -> None:
        """Follow until cancelled; without the plugin, look for it once a minute."""
        told = False
        while True:
            pause = REDIAL_SECONDS
            try:
                session = await dial_any(self._url, self._name)
            except BusUnavailable as error:
                log.debug("no events about connections: %s", error)
            else:
                try:
                    await self._follow(session)
                except (TopologyMissing, BusRefused) as error:
                    pause = LOOK_AGAIN_SECONDS
                    if not told:
                        log.info("a killed agent is noticed by its lease alone: %s", error)
                    told = True
                except BusUnavailable as error:
                    log.debug("no events about connections: %s", error)
                finally:
                    self.lost()
                    await session.close()
            await asyncio.sleep(pause)

    async def _follow(self, session: Session) -> None:
        channel = await session.channel(confirms=False)
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
        self.following()
        log.info("agents whose connection closes are noticed at once")
        await session.lost

    def following(self) -> None:
        """Note that from now on all events are ours."""
        self.is_following = True
        if self._was_lost:
            self._doubted_until = time.monotonic() + BURST_SECONDS

    def lost(self) -> None:
        """Note that events are missed: what happened meanwhile is not known, so nothing is."""
        self._was_lost = self._was_lost or self.is_following
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
        if agent_id in self._closed:
            self._closed[agent_id].is_line = True

    def closed(self, agent_id: UUID, pid: str) -> None:
        """Note that an agent's connection closed; it counts if the agent has no other."""
        is_known = pid in self._open[agent_id]
        self._open[agent_id].discard(pid)
        if self._open[agent_id]:
            return
        del self._open[agent_id]
        now = time.monotonic()
        # Whoever lost another connection just before has a bad line, or is one of many that dial.
        before = self._closed.get(agent_id)
        is_again = before is not None and now - before.at < FORGET_SECONDS
        # What broke our own line may have broken many: of those we saw the last few at most, which
        # look like deaths.
        self._closed[agent_id] = _Closed(now, is_known, is_again or now < self._doubted_until)
        asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.due.set)
