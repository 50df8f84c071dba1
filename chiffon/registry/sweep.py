"""What a sweep reads and writes; ``orchestrator.silence`` judges. Statements: ``sql/sweep.sql``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

from chiffon.registry.pool import Pool
from chiffon.registry.rows import Transition

SECONDS = 30.0
"""For one statement: most of a million agents that become silent at once take a while."""

HIDDEN_AT_ONCE = 5_000
"""Silent agents of an outage that one sweep takes out of the indexes: a fraction of a second."""


@dataclass(frozen=True, slots=True)
class SilentPool:
    """The silent agents of one pool.

    ``silent``: how many let their lease pass; ``unheard``: how many of those have not been heard
    since the path came back. ``due``: those to be marked offline if nothing excuses the pool, at
    most 10,000 of them. ``marked``: how many were marked for silence within a lease. ``members``:
    how many are online or busy, the silent among them; 0 where so few are silent that it was not
    counted.
    """

    pool_name: str
    silent: int
    unheard: int
    due: Sequence[UUID]
    marked: int = 0
    members: int = 0


@dataclass(frozen=True, slots=True)
class Outage:
    """A pool in an outage, and for how many seconds it has been.

    ``last_marked_seconds_ago`` is ``None`` if nobody of it was marked since it began.
    """

    pool_name: str
    seconds: float
    last_marked_seconds_ago: float | None
    members: int
    silent: int


class Sweep:
    """Reads who is silent, and writes what was judged. Raises what ``Registry`` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._fetch = partial(pool.fetch, answer_seconds=SECONDS)

    async def silent_pools(self, fewest: int) -> list[SilentPool]:
        """Return the pools that have silent agents; none while the path is not fresh.

        Args:
            fewest: Of a pool with more than so many silent or just marked, the members are counted.
        """
        async with self._pool.transaction() as transaction:
            await transaction.set_local(enable_seqscan="off")
            rows = await transaction.fetch("silence_candidates", answer_seconds=SECONDS)
        found = [SilentPool(row[0], row[1], row[3], row[2]) for row in rows if row[1]]
        marked = await self._counts("marked_lately", [one.pool_name for one in found if one.due])
        found = [replace(one, marked=marked.get(one.pool_name, 0)) for one in found]
        many = [one.pool_name for one in found if one.due and one.silent + one.marked > fewest]
        members = await self._counts("pool_sizes", many)
        return [replace(one, members=members.get(one.pool_name, 0)) for one in found]

    async def _counts(self, name: str, pool_names: Sequence[str]) -> dict[str, int]:
        rows = await self._fetch(name, pool_names=pool_names) if pool_names else []
        return {row[0]: row[1] for row in rows}

    async def outages(self) -> list[Outage]:
        """Return the pools in an outage; none while the path is not fresh."""
        return [Outage(*row) for row in await self._fetch("open_outages")]

    async def begin_outages(self, pool_names: Sequence[str]) -> list[str]:
        """Note that outages of these pools begin; returns those that were not in one already."""
        rows = await self._fetch("begin_outages", pool_names=pool_names) if pool_names else []
        return [row["pool_name"] for row in rows]

    async def end_outages(self, pool_names: Sequence[str]) -> list[str]:
        """Note that they are over, with a lease of grace for all; returns those that were open."""
        rows = await self._fetch("end_outages", pool_names=pool_names) if pool_names else []
        return [row["pool_name"] for row in rows]

    async def mark_offline(self, agent_ids: Sequence[UUID]) -> list[Transition]:
        """Mark agents offline that are still silent when they are locked; returns those."""
        rows = await self._fetch("mark_offline", agent_ids=agent_ids) if agent_ids else []
        return [Transition(row[0], row[1], row[2], "offline", row[3]) for row in rows]

    async def hide_silent(self) -> None:
        """Hide the silent of pools in an outage from offers, some at a time."""
        await self._fetch("hide_silent", most=HIDDEN_AT_ONCE)

    async def hide_disconnected(
        self, agent_ids: Sequence[UUID], seconds_ago: Sequence[float]
    ) -> list[tuple[UUID, str | None]]:
        """Hide agents from offers whose connection closed, and that have not spoken since.

        Returns:
            Ids and hosts of those that were not hidden already.
        """
        rows = await self._fetch("hide_disconnected", agent_ids=agent_ids, seconds_ago=seconds_ago)
        return [(row["agent_id"], row["hostname"]) for row in rows]
