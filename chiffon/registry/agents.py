"""Agents as they are shown, and what operators do to them; statements: ``sql/agents.sql``."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from chiffon.contract.fields import visible
from chiffon.errors import NoSuchAgent
from chiffon.registry.pool import Pool
from chiffon.registry.rows import AgentRow, FleetSummary, agent_of

FORGOTTEN_AT_ONCE = 500


class Forgotten(NamedTuple):
    """An agent that was removed."""

    agent_id: UUID
    hostname: str | None


_ID = re.compile(r"[0-9a-fA-F-]{1,36}")


class Agents:
    """The fleet as rows. Raises what ``Registry`` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def show(self, agent_id: UUID) -> AgentRow | None:
        """Return one agent, or ``None`` if there is no such agent."""
        rows = await self._pool.fetch("show", agent_id=agent_id)
        return agent_of(rows[0]) if rows else None

    async def show_many(self, agent_ids: Sequence[UUID]) -> list[AgentRow]:
        """Return these agents, in no order, without those that are not there."""
        rows = await self._pool.fetch("show_many", agent_ids=agent_ids)
        return [agent_of(row) for row in rows]

    async def list(
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
        after_pool, after_host, after_id = after or (None, None, None)
        rows = await self._pool.fetch(
            "list_agents",
            status=status,
            pool_name=pool_name,
            agent_type=agent_type,
            after_pool=after_pool,
            after_host=after_host,
            after_id=after_id,
            most=most,
        )
        return [agent_of(row) for row in rows]

    async def versions(self) -> dict[UUID, str]:
        """Return every agent's id, with a mark that is another one after each change of its row."""
        rows = await self._pool.fetch("versions")
        return {row["agent_id"]: row["version"] for row in rows}

    async def named(self, text: str) -> UUID:
        """Return the agent that a person means by its id, the beginning of it, or its host name.

        Raises:
            NoSuchAgent: Nobody has that name, or several have; the message says whom.
        """
        text = visible(text)
        beginning = f"{text.lower()}%" if _ID.fullmatch(text) else ""
        rows = await self._pool.fetch("named", text=text, beginning=beginning)
        exactly = [row for row in rows if text in (row["hostname"], str(row["agent_id"]))]
        rows = exactly or rows
        if len(rows) == 1:
            return UUID(str(rows[0]["agent_id"]))
        if not rows:
            raise NoSuchAgent(f"no agent has the id or host name {text[:64]!r}")
        some = ", ".join(f"{row['agent_id']} ({row['hostname'] or '?'})" for row in rows)
        raise NoSuchAgent(f"several agents are meant by {text[:64]!r}: {some}")

    async def summary(self) -> FleetSummary:
        """Return the fleet in numbers."""
        [row] = await self._pool.fetch("summary")
        return FleetSummary(**{**row, "agents": json.loads(row["agents"])})

    async def long_offline(self, seconds: float, pool_name: str | None) -> Sequence[AgentRow]:
        """Return the agents that ``forget_long_offline`` would remove, by pool and host."""
        rows = await self._pool.fetch(
            "list_long_offline", offline_seconds=seconds, pool_name=pool_name, unnamed_only=False
        )
        return [agent_of(row) for row in rows]

    async def forget_long_offline(
        self, seconds: float, pool_name: str | None = None, *, unnamed_only: bool = False
    ) -> Sequence[Forgotten]:
        """Remove agents that have been offline for long, 500 at most.

        Those that are drained, and on which something is reserved, stay.

        Args:
            seconds: For so long.
            pool_name: Only those in it.
            unnamed_only: Only those who said farewell, or whom no operator has ever drained,
                offered again or scored.
        """
        rows = await self._pool.fetch(
            "forget_long_offline",
            offline_seconds=seconds,
            pool_name=pool_name,
            unnamed_only=unnamed_only,
            most=FORGOTTEN_AT_ONCE,
        )
        if rows:
            await self._pool.fetch("forget_empty_pools")
        return [Forgotten(row["agent_id"], row["hostname"]) for row in rows]

    async def forget(self, agent_ids: Sequence[UUID]) -> Sequence[UUID]:
        """Remove agents, and what is known of pools that have none any more.

        One that still speaks is back, as a new agent, with its next heartbeat.

        Returns:
            Those that were there.
        """
        rows = await self._pool.fetch("forget", agent_ids=agent_ids)
        await self._pool.fetch("forget_empty_pools")
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
        await self._pool.fetch(
            "drain", agent_id=agent_id, reason=reason, deadline_seconds=deadline_seconds
        )
        return await self.show(agent_id)

    async def undrain(self, agent_id: UUID) -> AgentRow | None:
        """Offer an agent again; returns as ``drain`` does."""
        await self._pool.fetch("undrain", agent_id=agent_id)
        return await self.show(agent_id)
