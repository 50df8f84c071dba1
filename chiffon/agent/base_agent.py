"""``BaseAgent``: an agent inside any asyncio program.

While the broker is away nothing is kept but the wish to speak: there is no queue of old readings,
and when it is back a fresh one is sent at once.
"""

import asyncio
import logging
import math
import random
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

from chiffon import __version__
from chiffon.agent.identity import Identity, fresh, open_identity
from chiffon.amqp.connection import Connection
from chiffon.amqp.declare import await_exchange
from chiffon.amqp.publisher import Publisher, publish_heartbeat
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.fields import visible
from chiffon.contract.lease import lease_for, redial_cap
from chiffon.contract.messages import AgentStatus, AgentType, ResourceMetrics, StatusUpdate
from chiffon.contract.topology import HEARTBEATS
from chiffon.errors import (
    BusUnavailable,
    ChiffonError,
    NotTaken,
    TopologyMissing,
    Unroutable,
)
from chiffon.probes.reader import Reader

log = logging.getLogger(__name__)

JITTER = 0.05
"""Each pause is up to 5 % shorter or longer, so that agents started together drift apart."""

WARN_LOST_SECONDS = 60.0
"""Between two warnings that no queue takes our heartbeats."""


class Resources(Protocol):
    """What reads the host for an agent: ``Reader``, or something of your own."""

    def read(self) -> ResourceMetrics:
        """Return what is free now. Called on the event loop: it must not block."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


class BaseAgent:
    """Heartbeats of one agent, sent in the background while the context is open.

    ``status`` and ``capabilities`` may be set at any time and go out at once. A farewell is sent
    when the context ends.

    Args:
        url: The broker; several hosts allowed.
        state_folder: Where the agent's id is kept, so that it is the same after a restart. Without
            one it is a new agent at every start, and the last one's row stays in the registry,
            offline, until it is forgotten (by default after seven days).
        identity: Who this agent is, for those who keep that themselves; not with a state folder.
        agent_type: One of the contract's types.
        pool_name: The group this agent puts itself into.
        capabilities: Words that planners may ask for.
        interval_seconds: To the next heartbeat, as promised in each; 0.5 to 600.
        hostname: Shown to people; default ``socket.gethostname()``.
        resources: Reads the host; it stays the caller's to close. Default: a ``Reader``.

    Raises:
        pydantic.ValidationError: A value that the contract does not allow.
        BadConfiguration: Not an AMQP URL. As the context is entered: another agent runs on the
            state folder.
        StateUnavailable: As the context is entered: the state folder cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        state_folder: Path | None = None,
        identity: Identity | None = None,
        agent_type: AgentType = "desktop",
        pool_name: str = "default",
        capabilities: Iterable[str] = (),
        interval_seconds: float = 5.0,
        hostname: str | None = None,
        resources: Resources | None = None,
    ) -> None:
        if identity is not None and state_folder is not None:
            raise ValueError("an identity, or a state folder that keeps one: not both")
        self._state_folder = state_folder
        self.identity = fresh() if identity is None else identity
        self.hostname = visible(socket.gethostname()) if hostname is None else hostname
        self._agent_type = agent_type
        self._pool_name = pool_name
        self._capabilities = list(capabilities)
        self._status: AgentStatus = "online"
        self._interval = interval_seconds
        self._sequence = 0
        self._due = asyncio.Event()
        lease = lease_for(self.compose(None).interval_seconds)
        self._resources = resources
        self._supervised = ReconnectingConnection(
            url,
            name=str(self.identity.agent_id),
            prepare=self._await_exchange,
            redial_cap_seconds=redial_cap(lease),
        )
        self._publisher = Publisher(self._supervised)
        self._is_exchange_known = False
        self._confirmed, self._confirmed_at = 0, -math.inf
        self._warned_lost = -WARN_LOST_SECONDS
        self._stack = AsyncExitStack()
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:  # closed again if one of them fails
            if self._state_folder is not None:
                self.identity = opening.enter_context(open_identity(self._state_folder))
                self._supervised.name = str(self.identity.agent_id)
            if self._resources is None:
                self._resources = await Reader.open(self._interval)
                opening.callback(self._resources.close)
            await opening.enter_async_context(self._supervised)
            self._stack = opening.pop_all()
        self._task = asyncio.create_task(self._beat(), name="heartbeats")
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._stack:
            self._task.cancel()
            await asyncio.wait({self._task})
            await self._farewell()
        error = None if self._task.cancelled() else self._task.exception()
        if error is not None and not isinstance(error, ChiffonError):  # a bug of ours
            raise error

    @property
    def status(self) -> AgentStatus:
        """What the agent says of itself; setting it sends a heartbeat at once."""
        return self._status

    @status.setter
    def status(self, status: AgentStatus) -> None:
        before, self._status = self._status, status
        self._refuse_or_send(lambda: setattr(self, "_status", before))

    @property
    def capabilities(self) -> list[str]:
        """Words that planners may ask for; setting them sends a heartbeat at once."""
        return list(self._capabilities)

    @capabilities.setter
    def capabilities(self, capabilities: Iterable[str]) -> None:
        before, self._capabilities = self._capabilities, list(capabilities)
        self._refuse_or_send(lambda: setattr(self, "_capabilities", before))

    @property
    def supervised(self) -> ReconnectingConnection:
        """The connection to the broker."""
        return self._supervised

    @property
    def lease_seconds(self) -> float:
        """For how long one of its heartbeats counts."""
        return lease_for(self._interval)

    @property
    def heartbeats_confirmed(self) -> int:
        """How many heartbeats the broker has confirmed."""
        return self._confirmed

    @property
    def confirmed_seconds_ago(self) -> float:
        """Seconds since the last confirmed heartbeat; infinite before the first."""
        return time.monotonic() - self._confirmed_at

    async def wait(self) -> None:
        """Wait for as long as heartbeats are sent: until a bug of ours, which is raised."""
        await asyncio.shield(self._task)

    async def send_heartbeat(self) -> StatusUpdate:
        """Read the host, publish one heartbeat now and wait for the broker's confirm.

        Returns:
            What was sent.

        Raises:
            Unroutable: No queue takes heartbeats: the broker lost its binding.
            NotTaken: The queue did not take it.
            BusUnavailable: No connection, or no confirm, within 3 s. The connection is dropped
                and dialled again, unless an alarm of the broker blocks it.
        """
        update = self.compose(self._read())
        await self._publish(update)
        return update

    def compose(self, resources: ResourceMetrics | None) -> StatusUpdate:
        """Return the next heartbeat as it would be sent now, with these readings."""
        return StatusUpdate(
            agent_id=self.identity.agent_id,
            agent_type=self._agent_type,
            pool_name=self._pool_name,
            capabilities=self._capabilities,
            status=self._status,
            hostname=self.hostname,
            agent_version=__version__,
            incarnation=self.identity.incarnation,
            sequence=self._sequence + 1,
            sent_at=datetime.now(UTC),
            interval_seconds=self._interval,
            resources=resources,
        )

    def _refuse_or_send(self, undo: Callable[[], None]) -> None:
        try:
            self.compose(None)
        except ValueError:
            undo()
            raise
        self._due.set()

    def _read(self) -> ResourceMetrics:
        if self._resources is None:
            raise RuntimeError("enter the agent's context first: async with BaseAgent(...)")
        try:
            return self._resources.read()
        except Exception as error:
            # Whatever a probe runs into, the agent is alive, and says so.
            log.exception("the probes failed")
            return ResourceMetrics(probe_errors=[f"the probes failed: {type(error).__name__}"])

    async def _publish(self, update: StatusUpdate) -> None:
        self._sequence = update.sequence
        try:
            await publish_heartbeat(self._publisher, update)
        except TopologyMissing:
            self._is_exchange_known = False
            raise
        self._is_exchange_known = True
        self._supervised.reset_back_off()
        self._confirmed, self._confirmed_at = self._confirmed + 1, time.monotonic()

    async def _beat(self) -> None:
        while True:
            connection = await self._supervised.connection()
            self._due.clear()
            try:
                await self.send_heartbeat()
            except (Unroutable, NotTaken) as error:
                self._warn_lost(error)
            except BusUnavailable as error:
                log.warning("heartbeat %d not confirmed: %s", self._sequence, error)
                await connection.unblocked()
                continue
            await self._pause(connection)

    async def _pause(self, connection: Connection) -> None:
        """Wait until the next heartbeat is due: by time, by a change, or by a new connection."""
        due: asyncio.Future[Any] = asyncio.ensure_future(self._due.wait())
        try:
            await asyncio.wait(
                {due, connection.lost},
                timeout=self._interval * random.uniform(1 - JITTER, 1 + JITTER),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            due.cancel()

    def _warn_lost(self, error: Unroutable | NotTaken) -> None:
        now = time.monotonic()
        if now - self._warned_lost >= WARN_LOST_SECONDS:
            self._warned_lost = now
            log.warning("heartbeats are lost: %s; see `chiffon bus check`", error)

    async def _await_exchange(self, connection: Connection) -> None:
        # Not where heartbeats went before: a fleet that dials all at once has no time for it.
        if not self._is_exchange_known:
            await await_exchange(connection, HEARTBEATS)

    async def _farewell(self) -> None:
        """Say that we stop; the broker has 3 s to confirm it."""
        self._status = "offline"
        try:
            await self._publish(self.compose(None))
        except BusUnavailable as error:
            log.warning("no farewell: %s", error)
