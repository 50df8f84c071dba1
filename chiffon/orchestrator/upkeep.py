"""The topology stays on the broker: what somebody deletes, or a policy expires, is made again.

Most of it is missed at once by what uses it, and made again as that connects anew. But an exchange
that is gone takes its bindings with it, and who is bound to it is told nothing. So all of it is
declared again every few seconds, which changes nothing where it is there.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence

from chiffon.amqp.connection import Connection
from chiffon.amqp.declare import declare, ensure
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.topology import Topology
from chiffon.errors import BusRefused, QueueDown

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Between two declarations of all."""

LOOK_AGAIN_SECONDS = 60.0
"""Before another try at what we may not declare, or what is on a node that is down."""

DECLARED_SECONDS = 0.5
"""After a restart of the broker all connections need the topology at about the same time."""


class Upkeep:
    """Declares the topology, before it is used and again and again.

    Args:
        dial: Opens a connection; each refusal of the broker costs one.
        wanted: What is to be there.
        needed: The queues that there is no doing without.
    """

    def __init__(
        self, dial: Callable[[], Awaitable[Connection]], wanted: Topology, needed: Sequence[str]
    ) -> None:
        self._dial = dial
        self._wanted = wanted
        self._needed = needed
        self._declaring = asyncio.Lock()
        self._declared_at = self._failed_at = -math.inf
        self._down: set[str] = set()

    async def ensure(self, *_: object, is_missed: bool = False) -> None:
        """Make sure that the topology is there, for those who need it now.

        Args:
            *_: The connection that needs it, where this prepares one.
            is_missed: Whether a part of it is known not to be there.

        Raises:
            BusUnavailable: As ``declare.ensure``.
        """
        async with self._declaring:
            if is_missed or time.monotonic() - self._declared_at > DECLARED_SECONDS:
                await ensure(self._dial, self._wanted, self._needed)
                self._declared_at = time.monotonic()

    async def look(self, supervised: ReconnectingConnection) -> None:
        """Declare all of it once more, but what could not be declared a minute ago.

        Args:
            supervised: A connection for this alone: the broker closes it when it says no.

        Raises:
            TopologyMismatch: Something is there with other arguments.
            BusUnavailable: The broker cannot be asked.
        """
        if time.monotonic() - self._failed_at > LOOK_AGAIN_SECONDS:
            self._down.clear()
        elif not self._down:
            return
        connection = await supervised.connection()
        try:
            await declare(connection, self._wanted, without=self._down)
        except QueueDown as error:
            self._failed_at = time.monotonic()
            self._down.add(error.queue)
        except BusRefused as error:
            self._failed_at = time.monotonic()
            log.debug("may not declare what may be gone: %s", error)
        else:
            supervised.reset_back_off()
