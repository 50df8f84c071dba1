"""Heartbeats to rows of ``agent_registry``; the statements are in ``sql/heartbeats.sql``."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from chiffon.contract.lease import lease_for
from chiffon.contract.messages import ResourceMetrics
from chiffon.registry.pool import Pool
from chiffon.registry.rows import (
    Available,
    Received,
    Recorded,
    Reserved,
    Stale,
    transition_of,
)
from chiffon.registry.statements import STATEMENTS

_RECORD = STATEMENTS["record"]


class Heartbeats:
    """Records heartbeats. Raises what ``Registry`` does."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._prepared_on: set[int] = set()

    async def record(self, batch: Sequence[Received]) -> Recorded:
        """Apply heartbeats: one statement, in effect when this returns.

        Args:
            batch: Each agent at most once, in the order of their ids.

        Raises:
            RowRefused: PostgreSQL cannot store one of them; none was applied.
        """
        if not batch:
            return Recorded([], [], [])
        async with self._pool.one() as connection:
            await self._prepare_on(connection)
            rows = await connection.fetch(
                _RECORD.text, *_RECORD.arguments(_columns(batch, time.monotonic()))
            )
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
            [
                Reserved(row["agent_id"], row["reserved"], row["resource_metrics"])
                for row in rows
                if row["reserved"] is not None
            ],
        )

    async def _prepare_on(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        # The server parses a statement at its first use on a connection, and may wait for a lock
        # meanwhile: that has to be over before anybody says how long a message was held.
        backend = connection.get_server_pid()
        if backend not in self._prepared_on:
            await connection.fetch(_RECORD.text, *([] for _ in _RECORD.parameters))
            self._prepared_on.add(backend)

    async def write_available(self, computed: Mapping[Reserved, Available]) -> None:
        """Write what reservations leave of agents.

        Args:
            computed: By what it was computed from; a row that is not that any more is left alone.
        """
        if not computed:
            return
        rows = sorted(computed.items())
        await self._pool.fetch(
            "write_available",
            agent_ids=[one.agent_id for one, _ in rows],
            reserved=[one.reserved for one, _ in rows],
            resource_metrics=[one.resource_metrics for one, _ in rows],
            vram_gb=[available.vram_gb for _, available in rows],
            single_gpu_vram_gb=[available.single_gpu_vram_gb for _, available in rows],
            cores=[available.cores for _, available in rows],
            memory_gb=[available.memory_gb for _, available in rows],
        )

    async def count_lower_incarnations(self, agent_ids: Sequence[UUID]) -> None:
        """Note with each of these agents that a heartbeat of an earlier start came once more."""
        await self._pool.fetch("count_lower_incarnations", agent_ids=agent_ids)


def _columns(batch: Sequence[Received], now: float) -> dict[str, list[Any]]:
    """Return the parameters of ``record``: a list for each column."""
    updates = [one.update for one in batch]
    to_json = ResourceMetrics.__pydantic_serializer__.to_json
    return {
        "agent_ids": [one.agent_id for one in updates],
        "agent_types": [one.agent_type for one in updates],
        "pool_names": [one.pool_name for one in updates],
        "capabilities": [_words(tuple(one.capabilities)) for one in updates],
        "statuses": [one.status for one in updates],
        "hostnames": [one.hostname for one in updates],
        "agent_versions": [one.agent_version for one in updates],
        "incarnations": [one.incarnation for one in updates],
        "sequences": [one.sequence for one in updates],
        "sent_at": [one.sent_at for one in updates],
        "intervals": [one.interval_seconds for one in updates],
        "leases": [lease_for(one.interval_seconds) for one in updates],
        "held_seconds": [now - one.received for one in batch],
        "resources": [
            None if one.resources is None else to_json(one.resources).decode() for one in updates
        ],
    }


@lru_cache(maxsize=1_024)
def _words(capabilities: tuple[str, ...]) -> str:
    return json.dumps(capabilities)
