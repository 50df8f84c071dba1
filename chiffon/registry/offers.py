"""Candidates for a capacity question, best first; the statements are in ``sql/offers.sql``."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any
from uuid import UUID

import asyncpg

from chiffon.contract.messages import CapacityQuery
from chiffon.registry.pool import Pool, one_of
from chiffon.registry.rows import COLUMNS, Candidate, Found

EXAMINED_AT_ONCE = 2
"""Looks at every agent: each takes as long as the fleet is large, and heartbeats share the pool."""

IN_ORDER = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
}
"""Settings of the connections that read an index of the offers in its order. The statement is then
planned once a connection, where planning it takes as long as running it; and the planner, which
does not know how few rows are wanted, cannot choose to read and sort them all."""


def wanted(query: CapacityQuery) -> dict[str, Any]:
    """Return the parameters of ``may_fit``: what an index, or a look at the row, may leave out."""
    return {
        "min_gpu_vram_gb": query.min_gpu_vram_gb,
        "min_single_gpu_vram_gb": query.min_single_gpu_vram_gb,
        "min_cpu_cores": query.min_cpu_cores,
        "min_memory_gb": query.min_memory_gb,
        "agent_type": query.agent_type,
        "gpu_type": query.gpu_type,
        "capabilities": json.dumps(query.capabilities),
        "pool_name": query.pool_name,
    }


def is_rare(query: CapacityQuery) -> bool:
    """Return whether few may have what is asked for: then reading in order may be the long way."""
    return (
        bool(query.capabilities)
        or query.gpu_type is not None
        # What agents are unless they say otherwise.
        or query.agent_type not in (None, "desktop")
    )


class Offers:
    """Finds candidates. Raises what ``Registry`` does.

    Args:
        pool: For what PostgreSQL plans each time.
        in_order: Whose connections have the settings ``IN_ORDER``.
    """

    def __init__(self, pool: Pool, in_order: Pool) -> None:
        self._pool = pool
        self._in_order = in_order
        self._examining = asyncio.Semaphore(EXAMINED_AT_ONCE)

    async def find(self, query: CapacityQuery, most: int, skipped: int = 0) -> Found:
        """Return agents that may fit a query, best first.

        Args:
            query: The needs.
            most: How many at most.
            skipped: How many of the best to leave out.
        """
        pool = self._pool if is_rare(query) else self._in_order
        rows = await pool.fetch(
            "find" if query.pool_name is None else "find_in_pool",
            **wanted(query),
            most=most,
            skipped=skipped,
        )
        header = rows[0]
        return Found(
            header["as_of"],
            header["degraded"],
            header["malformed"],
            [_found(row) for row in rows if row["agent_id"] is not None],
        )

    async def candidate(self, agent_id: UUID) -> Candidate | None:
        """Return one agent as it is judged, or ``None`` if there is no such agent."""
        rows = await self._pool.fetch("candidate", agent_id=agent_id)
        return Candidate.of(rows[0]) if rows else None

    async def examine(self, *, with_metrics: bool) -> AsyncGenerator[list[asyncpg.Record], None]:
        """Yield every agent, some at a time: rows as ``examine`` in ``sql/offers.sql`` has them.

        Args:
            with_metrics: Whether to read the metrics also of agents without reservations.
        """
        async with one_of(self._examining), self._pool.transaction() as transaction:
            async for rows in transaction.stream("examine", with_metrics=with_metrics):
                yield rows


def _found(row: asyncpg.Record) -> Candidate:
    return Candidate(*row[3 : 3 + COLUMNS])
