"""Messages that a relay refused, on their way to the dead letters."""

import asyncio
import logging
import time

from chiffon.dead_letters import DeadLetters
from chiffon.encoding import Refusal
from chiffon.errors import BusUnavailable
from chiffon.frames import Delivery

log = logging.getLogger(__name__)

MOST_BYTES = 16 * 1024 * 1024
MOST = 1_000
WARN_SECONDS = 1.0


class Letters:
    """Sets messages aside, one after another, beside the heartbeats and never before them.

    What cannot be set aside is lost but for a line in the log: it is not worth a wait of those
    that speak as they should.

    Args:
        dead_letters: On a connection of its own.
    """

    def __init__(self, dead_letters: DeadLetters) -> None:
        self._dead_letters = dead_letters
        self._waiting: asyncio.Queue[tuple[Delivery, Refusal]] = asyncio.Queue(MOST)
        self._bytes = 0
        self._warned = -WARN_SECONDS

    def add(self, delivery: Delivery, refusal: Refusal) -> None:
        """Set a message aside, or a part of it, when its turn comes."""
        if self._waiting.full() or self._bytes + len(refusal.body) > MOST_BYTES:
            self._warn(f"lost, as too many wait to be set aside: {refusal.reason}", delivery)
            return
        self._warn(f"set aside: {refusal.reason}", delivery)
        self._bytes += len(refusal.body)
        self._waiting.put_nowait((delivery, refusal))

    async def run(self) -> None:
        """Set aside until cancelled."""
        while True:
            delivery, refusal = await self._waiting.get()
            try:
                await self._dead_letters.set_aside(delivery, refusal)
            except BusUnavailable as error:
                self._warn(f"lost, as dead letters are not confirmed: {error}", delivery)
            finally:
                self._bytes -= len(refusal.body)
                self._waiting.task_done()

    async def drained(self) -> None:
        """Wait until none waits."""
        await self._waiting.join()

    def _warn(self, text: str, delivery: Delivery) -> None:
        now = time.monotonic()
        if now - self._warned >= WARN_SECONDS:
            self._warned = now
            log.warning("a message with key %r is %s", delivery.routing_key[:64], text)
