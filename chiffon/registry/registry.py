"""The fleet as PostgreSQL has it, by subject. All SQL is in this package; PostgreSQL's clock rules.

Statements that update several agents lock them in the order of ``agent_id``, so any number of
orchestrators may run them at once without a deadlock.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from chiffon.errors import TablesMissing
from chiffon.registry.agents import Agents
from chiffon.registry.heartbeat_path import HeartbeatPath
from chiffon.registry.heartbeats import Heartbeats
from chiffon.registry.offers import IN_ORDER, Offers
from chiffon.registry.pool import Pool
from chiffon.registry.reservations import ReservationRows
from chiffon.registry.sweep import Sweep
from chiffon.registry.wait_queue import WaitQueue

CONNECTIONS = 8


class Registry:
    """The only caller of SQL. Made by ``open``; safe to use from many tasks at once.

    Every method of its parts raises ``RegistryUnavailable`` when PostgreSQL cannot be reached or
    does not answer within 5 s (in a sweep 30 s), and ``RegistryRefused`` when it does not let us
    in.
    """

    def __init__(self, pool: Pool, in_order: Pool) -> None:
        self._pool = pool
        self.heartbeats = Heartbeats(pool)
        self.path = HeartbeatPath(pool)
        self.sweep = Sweep(pool)
        self.agents = Agents(pool)
        self.offers = Offers(pool, in_order)
        self.reservations = ReservationRows(pool, in_order)
        self.wait_queue = WaitQueue(pool)

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, connections: int = CONNECTIONS) -> AsyncIterator["Registry"]:
        """Open the registry; connections are made when they are needed.

        Args:
            url: ``postgresql://user:password@host/database``; ``+asyncpg`` is accepted.
            connections: How many may be open at once, and as many again for what reads an index of
                the offers in its order.

        Raises:
            BadConfiguration: Not such a URL.
        """
        async with (
            Pool.open(url, connections) as pool,
            Pool.open(url, connections, IN_ORDER) as in_order,
        ):
            yield cls(pool, in_order)

    async def revision(self) -> str | None:
        """Return the revision of the database's structure, ``None`` where there is none yet."""
        try:
            rows = await self._pool.fetch("revision")
        except TablesMissing:
            return None
        return rows[0]["version_num"] if rows else None

    async def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of the tables and views that the database does not have."""
        rows = await self._pool.fetch("missing_tables", names=names)
        return [row["wanted"] for row in rows]
