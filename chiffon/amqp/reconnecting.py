"""A connection that is kept alive.

A ``ReconnectingConnection`` dials the hosts in turn with full jitter, prepares what its owner needs
on each new connection, and drops it whole at the first sign of trouble, an error on any of its
channels included. The robust mode of aio-pika is not used: it knows one host, a fixed pause, and
has left consumers dead on a connection that said it was open.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, Self

from typing_extensions import TypeVar

from chiffon.amqp.connection import AnyConnection, Connection
from chiffon.amqp.connection import dial as dial_one
from chiffon.amqp.translation import translated
from chiffon.amqp.url import hosts
from chiffon.contract.lease import redial_delay
from chiffon.errors import BusRefused, BusUnavailable, TopologyMissing
from chiffon.logs import Trouble

log = logging.getLogger(__name__)

C = TypeVar("C", bound=AnyConnection, default=Connection)


REFUSED_CAPS = 3
"""How many times longer the longest pause is while the broker refuses us: for an agent a lease."""


class ReconnectingConnection(Generic[C]):
    """One AMQP connection that is kept alive for as long as the context is open.

    Args:
        url: One or several hosts; see ``hosts``.
        name: Shown as the connection's name in the management UI.
        prepare: Run on each new connection before anyone else gets it: declares, consumes.
        redial_cap_seconds: The longest pause between two dials.
        stop_if_refused: Whether a broker that refuses us before we were ever let in ends the
            connection with ``BusRefused``. Later refusals never do: somebody is mending the broker.
        dial: Opens a connection to a URL with one host, under a name; ``connection.dial`` if not
            given.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        prepare: Callable[[C], Awaitable[None]] | None = None,
        redial_cap_seconds: float = 5.0,
        stop_if_refused: bool = False,
        dial: Callable[[str, str], Awaitable[C]] | None = None,
    ) -> None:
        self.trouble = "not connected yet"
        self.connections_made = 0
        self._urls = hosts(url)
        self.name = name
        self._prepare = prepare
        self._dial: Callable[[str, str], Awaitable[Any]] = dial or dial_one
        self._cap = redial_cap_seconds
        self._stop_if_refused = stop_if_refused
        self._attempt = 0
        self._last_error: BusUnavailable | None = None
        self._lasting = Trouble()
        self._closing: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[C]
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._ready = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise(), name=f"keeps {self.name} alive")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError, BusRefused):
            await self._task
        if self._closing:
            await asyncio.wait(self._closing)
        self._ready.cancel()

    async def connection(self) -> C:
        """Return the live connection, waiting for one as long as it takes.

        Raises:
            BusRefused: The broker refused us and it was made with ``stop_if_refused``.
        """
        return await asyncio.shield(self._ready)

    @property
    def current(self) -> C | None:
        """The live connection, ``None`` while there is none."""
        is_up = self._ready.done() and not self._ready.cancelled() and not self._ready.exception()
        return self._ready.result() if is_up else None

    @property
    def lacks_topology(self) -> bool:
        """Whether the broker lets us in, and what we need is not on it yet."""
        return isinstance(self._last_error, TopologyMissing)

    def reset_back_off(self) -> None:
        """Say that the connection did its work, so that the next redial is quick again.

        A connection alone is no proof: a broker that takes connections and drops them would
        otherwise be dialled twice a second by the whole fleet.
        """
        self._attempt = 0

    async def _supervise(self) -> None:
        first = random.randrange(len(self._urls))
        while True:
            url = self._urls[(first + self._attempt) % len(self._urls)]
            connection = await self._dial_and_prepare(url)
            if connection is not None:
                try:
                    await self._serve(connection)
                finally:
                    self._close_aside(connection)
            # Somebody has to make the user or mend its rights: that is not done sooner for asking.
            is_refused = isinstance(self._last_error, BusRefused)
            cap = REFUSED_CAPS * self._cap if is_refused else self._cap
            delay = redial_delay(self._attempt, cap, random.random())
            self._attempt += 1
            await asyncio.sleep(delay)

    async def _serve(self, connection: C) -> None:
        """Hand the connection out until it is lost."""
        self._stop_if_refused = False
        self._last_error = None
        self._lasting.is_over()
        self.trouble = f"the broker at {connection.where} does not answer"
        if not connection.lost.done():
            connection.on_lost = self._renew
            self._ready.set_result(connection)
            self.connections_made += 1
            log.info("connected to the broker at %s (%s)", connection.where, self.name)
        self.trouble = await asyncio.shield(connection.lost)
        log.warning("lost the broker at %s: %s", connection.where, self.trouble)

    def _close_aside(self, connection: C) -> None:
        # A dead peer takes seconds to close, which the next dial need not wait for.
        connection.drop("closed by us")
        closing = asyncio.create_task(connection.close(), name=f"closing {self.name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _renew(self) -> None:
        # At the moment of the loss, so that nobody is handed the connection that was just lost.
        self._ready = asyncio.get_running_loop().create_future()

    async def _dial_and_prepare(self, url: str) -> C | None:
        connection: C | None = None
        try:
            with translated("dialling"):
                connection = await self._dial(url, self.name)
                connection.reset_back_off = self.reset_back_off
                if self._prepare is not None:
                    await self._prepare(connection)
        except Exception as error:
            if connection is not None:
                self._close_aside(connection)
            if not isinstance(error, BusUnavailable):
                # A bug must not end the only task that would dial again.
                log.exception("preparing the connection failed")
                error = BusUnavailable(f"preparing the connection failed: {error!r}")
            self._report(error)
            if self._stop_if_refused and isinstance(error, BusRefused):
                self._ready.set_exception(error)
                self._ready.exception()  # seen here, so that nobody has to ask for it
                raise
            return None
        except BaseException:
            if connection is not None:
                self._close_aside(connection)
            raise
        return connection

    def _report(self, error: BusUnavailable) -> None:
        if self._lasting.is_news(str(error)):
            log.warning("%s; trying again", error)
        self.trouble = str(error)
        self._last_error = error
