"""Does the broker see what the client believes? A consumer may be dead on an open connection.

The client is not asked: over another connection the broker says how many consumers the queue has
and how many messages wait in it. A consumer that it does not see, or that is given nothing while
messages wait, is started anew with its connection; if that does not help, the process ends, so
that whoever supervises it starts it again.
"""

import asyncio
import logging

from chiffon.amqp.connection import Connection
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.amqp.translation import translated
from chiffon.errors import BusUnavailable, ConsumerStuck
from chiffon.orchestrator.ingest import Ingest

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
IDLE_SECONDS = 5.0
"""A consumer that was given something, or was started, since then is not suspected: the broker's
counts lag behind a little."""

MOST_MENDS = 3
"""So many fresh connections in a row that did not help end the process."""


class Watchdog:
    """Watches the consumer of heartbeats.

    Args:
        ingest: What should be consuming.
        supervised: Another connection than the one that consumes.
    """

    def __init__(self, ingest: Ingest, supervised: ReconnectingConnection) -> None:
        self._ingest = ingest
        self._supervised = supervised
        self._mends = 0
        self.queue = ingest.queue

    async def run(self) -> None:
        """Look every 2 s until cancelled.

        Raises:
            ConsumerStuck: Fresh connections did not help.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._ingest.is_attached or self._ingest.idle_seconds < IDLE_SECONDS:
                continue
            try:
                problem = await self.look()
            except BusUnavailable as error:
                log.debug("the broker cannot be asked: %s", error)  # others say so louder
                continue
            self._judge(problem)

    async def look(self) -> str | None:
        """Return what is wrong with the consumer, as the broker sees it; ``None`` if nothing is.

        Raises:
            BusUnavailable: The broker cannot be asked.
        """
        connection = await self._supervised.connection()
        ready, consumers = await _counts(connection, self._ingest.queue)
        if consumers == 0:
            return f"the broker sees no consumer on {self._ingest.queue}"
        if ready and self._ingest.may_get_more:
            return f"{ready} messages wait in {self._ingest.queue} and none is delivered"
        return None

    def _judge(self, problem: str | None) -> None:
        if problem is None:
            self._mends = 0
            return
        self._mends += 1
        if self._mends > MOST_MENDS:
            raise ConsumerStuck(f"{problem}, after {MOST_MENDS} fresh connections")
        log.error("%s: starting the consumer anew", problem)
        self._ingest.drop(problem)


async def _counts(connection: Connection, queue: str) -> tuple[int, int]:
    channel = await connection.channel(confirms=False)
    with translated(f"looking at {queue}"):
        answer = await channel.queue_declare(queue, passive=True, timeout=LOOK_SECONDS)
    await connection.discard(channel)
    return answer.message_count or 0, answer.consumer_count or 0
