"""The fleet as PostgreSQL has it. All SQL is here, and every time in it is the database's.

Each method is one round trip, a sweep four. Statements that update several agents lock them in
the order of ``agent_id``, so any number of orchestrators may run them at once without a deadlock.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from chiffon import liveness
from chiffon.errors import TablesMissing
from chiffon.messages import CapacityQuery, CapacityReserve
from chiffon.receipt import Receipt
from chiffon.registry.columns import columns
from chiffon.registry.connection import Connections, answering, asyncpg_url, one_of
from chiffon.registry.offers import (
    EXPLAIN,
    FIND,
    FIND_IN_ORDER,
    FIND_IN_POOL,
    IN_ORDER,
    asked,
    has_rare_words,
    taken,
)
from chiffon.registry.rows import (
    AgentRow,
    Closing,
    FleetSummary,
    Found,
    Misfits,
    Recorded,
    Stale,
    Swept,
    Transition,
    agent_of,
    document,
    misfits_of,
    transition_of,
)
from chiffon.registry.statements import (
    COUNT_LOWER_INCARNATIONS,
    DRAIN,
    FORGET,
    FORGET_EMPTY_POOLS,
    LAPSE,
    LIST,
    MARK_PART_FRESH,
    MARK_PATH_FRESH,
    MARK_SILENT,
    RECORD,
    SETTLE_GRACE,
    SHOW,
    SHOW_MANY,
    SUMMARY,
    THAW,
    UNDRAIN,
    VERSIONS,
)
from chiffon.topology import INGEST

__all__ = [
    "CONNECTIONS",
    "AgentRow",
    "Closing",
    "FleetSummary",
    "Found",
    "Misfits",
    "Recorded",
    "Registry",
    "Stale",
    "Swept",
    "Transition",
    "answering",
    "asyncpg_url",
    "document",
]


SWEEP_SECONDS = 30.0
"""For one statement of a sweep: most of a million agents that fall silent at once take a while."""

CONNECTIONS = 8

EXPLAINED_AT_ONCE = 2
"""Looks at every agent: each takes as long as the fleet is large, and heartbeats share the pool."""

CLAIMED_AT_ONCE = 6
"""Claims wait for the disk, and what is found must not wait for them: they share a pool."""

LAPSE_AT_ONCE = 5_000
"""Silent agents of an outage that one sweep takes out of the indexes: a fraction of a second."""


class Registry:
    """The only caller of SQL. Safe to use from many tasks at once.

    Every method raises ``RegistryUnavailable`` when PostgreSQL cannot be reached or does not
    answer within 5 s (in a sweep 30 s), and ``RegistryRefused`` when it does not let us in.
    """

    def __init__(self, connections: Connections, in_order: Connections) -> None:
        self._connections = connections
        self._in_order = in_order
        self._prepared_on: set[int] = set()
        self._explained = asyncio.Semaphore(EXPLAINED_AT_ONCE)
        self._claimed = asyncio.Semaphore(CLAIMED_AT_ONCE)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, connections: int = CONNECTIONS) -> AsyncIterator["Registry"]:
        """Open the registry; connections are made when they are needed.

        Args:
            url: ``postgresql://user:password@host/database``; ``+asyncpg`` is accepted.
            connections: How many may be open at once, and as many again for offers and claims.

        Raises:
            BadConfiguration: Not such a URL.
        """
        async with (
            Connections.open(url, connections) as plain,
            Connections.open(url, connections, IN_ORDER) as in_order,
        ):
            yield cls(plain, in_order)

    async def record(self, batch: Sequence[Receipt]) -> Recorded:
        """Apply heartbeats: one statement, in effect when this returns.

        Args:
            batch: Each agent at most once.

        Returns:
            Those that were not applied: not newer than what the registry holds, or held here
            for longer than their lease; they touched nothing. And the agents whose status changed.

        Raises:
            RowRefused: PostgreSQL cannot store one of them; none was applied.
        """
        if not batch:
            return Recorded([], [])
        async with self._connections.one() as connection:
            await self._prepare_on(connection)
            rows = await connection.fetch(RECORD, *columns(batch, time.monotonic()))
        changed = {row["agent_id"] for row in rows if row["is_changed"]}
        return Recorded(
            [
                Stale(row["agent_id"], row["incarnation"], row["kept_incarnation"])
                for row in rows
                if row["is_stale"]
            ],
            [transition_of(one.update) for one in batch if one.update.agent_id in changed]
            if changed
            else [],
        )

    async def _prepare_on(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        # The server parses a statement at its first use on a connection, and may wait for a lock
        # meanwhile: that has to be over before anybody says how long a message was held.
        backend = connection.get_server_pid()
        if backend not in self._prepared_on:
            await connection.fetch(RECORD, *([] for _ in range(14)))
            self._prepared_on.add(backend)

    async def count_lower_incarnations(self, agent_ids: Sequence[UUID]) -> None:
        """Note with each of these agents that a heartbeat of an earlier start came once more."""
        await self.fetch(COUNT_LOWER_INCARNATIONS, agent_ids)

    async def mark_path_fresh(
        self,
        received: float,
        delay_seconds: float | None = None,
        *,
        part: str = INGEST,
        path: Sequence[str] = (INGEST,),
    ) -> None:
        """Note that a canary went the whole way to the database.

        The path is fresh while each of its parts is. After a gap of more than 5 s every agent has
        its own full lease to speak again.

        Args:
            received: When this process received it, seconds of ``time.monotonic``.
            delay_seconds: How long it was on its way to us, if that is known.
            part: What it proves.
            path: All the parts; see ``Topology.path``.
        """
        async with self._connections.one() as connection:
            await connection.fetch(MARK_PART_FRESH, time.monotonic() - received, part)
            await connection.fetch(MARK_PATH_FRESH, delay_seconds, path)

    async def mark_silent(
        self,
        closings: Sequence[Closing] = (),
        *,
        share: float = liveness.OUTAGE_SHARE,
        hold_seconds: float = liveness.OUTAGE_HOLD_SECONDS,
    ) -> Swept:
        """Move every silent agent offline, if the path from the agents to us is proven.

        When more than ``share`` of a pool, and more than two agents, fall silent within a lease,
        that is one outage: the pool's transitions are held, for ``hold_seconds`` at most, and
        then made one a second. When its agents speak again, everybody has a lease of grace.
        So it is if a quarter of a pool has not been heard since the path came back.

        One statement, so any number of orchestrators may run it at once and each transition is
        returned to exactly one of them. No leader is needed.

        Args:
            closings: Agents whose connection closed. Those that have said nothing since are as
                silent as if their lease had passed, and are marked 1.5 s after it, unless many
                connections closed with theirs.
            share: Of a pool's agents, 0 to 1.
            hold_seconds: How long a pool's transitions are held.

        Returns:
            What changed; empty almost always.
        """
        async with self._connections.one() as connection:
            sweep = partial(connection.fetch, timeout=SWEEP_SECONDS)
            await sweep(LAPSE, LAPSE_AT_ONCE)
            await sweep(SETTLE_GRACE)
            thawed = await sweep(THAW, liveness.OUTAGE_OVER_SHARE)
            rows = await sweep(
                MARK_SILENT,
                share,
                liveness.OUTAGE_FEWEST,
                hold_seconds,
                [one.agent_id for one in closings],
                [one.seconds_ago for one in closings],
                [one.is_known for one in closings],
                [one.is_line for one in closings],
                liveness.BURST_SHARE,
                liveness.BURST_SECONDS,
                liveness.OUTAGE_OVER_SHARE,
            )
        return Swept(
            [
                Transition(row[0], row[1], row[2], "offline", row[3])
                for row in rows
                if row["agent_id"] is not None
            ],
            [row["pool_name"] for row in rows if row["agent_id"] is None],
            [row["pool_name"] for row in thawed],
        )

    async def find(self, query: CapacityQuery, most: int) -> Found:
        """Return the agents that can take ``query`` now, best first.

        Args:
            query: The needs.
            most: How many rows to return at most.
        """
        if has_rare_words(query):
            rows = await self.fetch(FIND, *asked(query, most))
        else:
            in_order = FIND_IN_ORDER if query.pool_name is None else FIND_IN_POOL
            rows = await self.fetch_in_order(in_order, *asked(query, most))
        header = rows[0]
        return Found(
            as_of=header["as_of"],
            degraded=header["degraded"],
            malformed=header["malformed"],
            rows=[row for row in rows if row["agent_id"] is not None],
        )

    async def explain(
        self, query: CapacityQuery, most: int, reserve: CapacityReserve | None = None
    ) -> Misfits:
        """Return which of the rules of an offer agents break, by a look at every one of them.

        Args:
            query: The needs.
            most: How many of the nearest misses to name at most.
            reserve: What is to be reserved; its needs are in ``query``.
        """
        async with one_of(self._explained):
            [row] = await self.fetch(EXPLAIN, *asked(query, most), *taken(reserve))
        return misfits_of(row)

    async def show(self, agent_id: UUID) -> AgentRow | None:
        """Return one agent, or ``None`` if there is no such agent."""
        rows = await self.fetch(SHOW, agent_id)
        return agent_of(rows[0]) if rows else None

    async def show_many(self, agent_ids: Sequence[UUID]) -> list[AgentRow]:
        """Return these agents, in no order, without those that are not there."""
        return [agent_of(row) for row in await self.fetch(SHOW_MANY, agent_ids)]

    async def list_agents(
        self,
        status: str | None = None,
        pool_name: str | None = None,
        agent_type: str | None = None,
        *,
        after: tuple[str, str, UUID] | None = None,
        most: int | None = None,
    ) -> list[AgentRow]:
        """Return agents that fit the filters (``None``: any), by pool, host and id.

        Args:
            status: Only these.
            pool_name: Only those in it.
            agent_type: Only these.
            after: Pool, host (empty if unknown) and id of the last one that is not wanted again.
            most: How many at most; ``None`` for all.
        """
        place = after or (None, None, None)
        rows = await self.fetch(LIST, status, pool_name, agent_type, *place, most)
        return [agent_of(row) for row in rows]

    async def versions(self) -> dict[UUID, str]:
        """Return every agent's id, with a mark that is another one after each change of its row."""
        return {row["agent_id"]: row["version"] for row in await self.fetch(VERSIONS)}

    async def summary(self) -> FleetSummary:
        """Return the fleet in numbers."""
        [row] = await self.fetch(SUMMARY)
        return FleetSummary(
            as_of=row["as_of"],
            degraded=row["degraded"],
            frozen_pools=row["frozen_pools"],
            agents=json.loads(row["agents"]),
            silent=row["silent"],
            reservations=row["reservations"],
            waiting=row["waiting"],
        )

    async def forget(self, agent_ids: Sequence[UUID]) -> list[UUID]:
        """Remove agents, and what is known of pools that have none any more.

        One that still speaks is back, as a new agent, with its next heartbeat.

        Returns:
            Those that were there.
        """
        rows = await self.fetch(FORGET, agent_ids)
        await self.fetch(FORGET_EMPTY_POOLS)
        return [row["agent_id"] for row in rows]

    async def drain(
        self, agent_id: UUID, reason: str | None = None, deadline_seconds: float | None = None
    ) -> AgentRow | None:
        """Give an agent no more offers and reservations, whatever it reports.

        Args:
            agent_id: Whom.
            reason: For people.
            deadline_seconds: When what is still reserved on it is ended; ``None``: never.

        Returns:
            The agent as it is now, or ``None`` if there is no such agent.
        """
        await self.fetch(DRAIN, agent_id, reason, deadline_seconds)
        return await self.show(agent_id)

    async def undrain(self, agent_id: UUID) -> AgentRow | None:
        """Offer an agent again; returns as ``drain`` does."""
        await self.fetch(UNDRAIN, agent_id)
        return await self.show(agent_id)

    async def revision(self) -> str | None:
        """Return the revision of the database's structure, ``None`` where there is none yet."""
        try:
            rows = await self.fetch("SELECT version_num FROM alembic_version")
        except TablesMissing:
            return None
        return rows[0]["version_num"] if rows else None

    async def fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run one statement of this package, on a connection and in a transaction of its own."""
        async with self._connections.one() as connection:
            return await connection.fetch(statement, *arguments)

    async def claim(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run the statement of a claim as ``fetch`` does, by a plan that is made once."""
        async with one_of(self._claimed):
            return await self.fetch_in_order(statement, *arguments)

    async def fetch_in_order(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        """Run a statement as ``fetch`` does, by a plan that is made once a connection."""
        async with self._in_order.one() as connection:
            return await connection.fetch(statement, *arguments)
