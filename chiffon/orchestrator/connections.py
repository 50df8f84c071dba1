"""The connections of one orchestrator, each for one use, under a name that the broker shows.

An alarm of the broker stops everything on a connection that publishes, acknowledgements included,
so what consumes does not publish. What publishes where others say, or what a queue that is down
never confirms, has a connection of its own: the loss of it must not cost the others theirs.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from chiffon.amqp.reconnecting import ReconnectingConnection

Prepare = Callable[[Any], Awaitable[None]]
Dial = Callable[[str, str], Awaitable[Any]]


class Connections:
    """Opens connections that are closed together.

    Args:
        url: The broker.
        name: Of the orchestrator.
        stack: Closes them.
    """

    def __init__(self, url: str, name: str, stack: AsyncExitStack) -> None:
        self._url = url
        self._name = name
        self._stack = stack
        self._by_use: dict[str, ReconnectingConnection[Any]] = {}

    @property
    def by_use(self) -> Mapping[str, ReconnectingConnection[Any]]:
        """All of them, by what each is for."""
        return self._by_use

    async def open(
        self, use: str, *, prepare: Prepare | None = None, dial: Dial | None = None
    ) -> ReconnectingConnection[Any]:
        """Open one, and keep it alive.

        Args:
            use: What it is for: a verb, and perhaps a queue.
            prepare: See ``ReconnectingConnection``.
            dial: See ``ReconnectingConnection``.
        """
        supervised: ReconnectingConnection[Any] = ReconnectingConnection(
            self._url, name=f"{self._name} {use}", prepare=prepare, dial=dial
        )
        self._by_use[use] = supervised
        return await self._stack.enter_async_context(supervised)
