"""Agents' recent readings, in the memory of the gateway, for the sparklines of the fleet page."""

import math
from array import array
from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import UUID

from pydantic import BaseModel

from chiffon.capacity.service import describe
from chiffon.registry.rows import AgentRow

MOST_READINGS = 120
"""Of each agent: ten minutes at the usual interval of 5 s. Agents that speak more often than the
registry is looked at are sampled."""

_VALUES = (
    "cpu_percent",
    "cpu_cores_available",
    "memory_available_gb",
    "gpu_vram_available_gb",
)
_WIDTH = 1 + len(_VALUES)


class Reading(BaseModel):
    """What one heartbeat said; ``at`` is when it was received. ``null`` is unknown."""

    at: datetime
    cpu_percent: float | None
    cpu_cores_available: float | None
    memory_available_gb: float | None
    gpu_vram_available_gb: float | None


class History:
    """The newest readings of every agent since the gateway started: 5 KB an agent."""

    def __init__(self) -> None:
        self._kept: dict[UUID, array[float]] = {}

    def note(self, rows: Iterable[AgentRow]) -> None:
        """Keep what these agents say now, unless it is kept already."""
        for row in rows:
            if row.last_heartbeat_at is None or row.resource_metrics == {}:
                continue
            at = row.last_heartbeat_at.timestamp()
            kept = self._kept.setdefault(row.agent_id, array("d"))
            if kept and kept[-_WIDTH] == at:
                continue
            capacity = describe(row)
            values = (getattr(capacity, name) for name in _VALUES)
            kept.extend((at, *(math.nan if value is None else value for value in values)))
            del kept[: max(len(kept) - _WIDTH * MOST_READINGS, 0)]

    def forget(self, agent_ids: Iterable[UUID]) -> None:
        """Drop agents that are no longer in the registry."""
        for agent_id in agent_ids:
            self._kept.pop(agent_id, None)

    def of(self, agent_id: UUID) -> list[Reading]:
        """Return an agent's readings, oldest first; empty if there are none."""
        kept = self._kept.get(agent_id, array("d"))
        return [
            Reading(
                at=datetime.fromtimestamp(kept[start], UTC),
                **{
                    name: None if math.isnan(value) else value
                    for name, value in zip(_VALUES, kept[start + 1 : start + _WIDTH], strict=True)
                },
            )
            for start in range(0, len(kept), _WIDTH)
        ]
