"""The fleet as it is shown to people and programs: by the CLI, over HTTP, on the page."""

from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from chiffon.capacity.room import room
from chiffon.contract.messages import AgentStatus, ReservedGpu
from chiffon.registry.rows import AgentRow, FleetSummary


class ReservedPart(BaseModel):
    """What one reservation has of an agent."""

    reservation_id: UUID
    fence: int
    gpus: list[ReservedGpu]
    cpu_cores: int
    memory_gb: float


class AvailableAmounts(BaseModel):
    """What can still be reserved of an agent."""

    gpu_vram_gb: float
    single_gpu_vram_gb: float
    cpu_cores: int
    memory_gb: float

    @classmethod
    def on(cls, row: AgentRow) -> "AvailableAmounts | None":
        """Return what is left on an agent; ``None`` where nothing is reserved."""
        if not row.reserved:
            return None
        left = room(row.resource_metrics, row.reserved).available
        return cls(
            gpu_vram_gb=left.vram_gb,
            single_gpu_vram_gb=left.single_gpu_vram_gb,
            cpu_cores=int(left.cores),
            memory_gb=left.memory_gb,
        )


class Agent(BaseModel):
    """One agent, with all that the registry knows of it. Ages are on the database's clock."""

    agent_id: UUID
    agent_type: str
    pool_name: str
    capabilities: list[str]
    status: AgentStatus
    hostname: str | None
    agent_version: str | None
    incarnation: int = Field(description="The agent's start, in unix milliseconds.")
    sequence: int = Field(description="Counts its heartbeats from 1 within an incarnation.")
    sent_at: datetime | None = Field(description="The agent's clock; only shown.")
    interval_seconds: float
    lease_seconds: float = Field(description="For how long a heartbeat counts.")
    drained: bool = Field(description="It is given no offers and no reservations.")
    drain_reason: str | None
    drained_at: datetime | None
    drain_deadline: datetime | None = Field(description="When what is reserved on it is ended.")
    last_heartbeat_at: datetime | None = Field(description="When it was received.")
    performance_score: float
    status_reason: str | None = Field(description="Why it is offline.")
    status_changed_at: datetime | None
    lower_incarnations: int = Field(
        description="Heartbeats of an earlier start, which changed nothing: many are a cloned disk."
    )
    lower_incarnation_at: datetime | None
    clock_skew_seconds: float | None = Field(
        description="By how much the agent's clock is ahead, less the time on the way."
    )
    queue_delay_seconds: float | None = Field(description="The time on the way, for all agents.")
    heartbeat_age_seconds: float | None
    is_silent: bool = Field(description="Its lease is over; it is not offered.")
    resources: Any = Field(description="What its probes read, in the words of the heartbeat.")
    reserved: list[ReservedPart] = Field(
        description="What is reserved on it, in the order of fences."
    )
    available: AvailableAmounts | None = Field(
        description="What that leaves; null where nothing is reserved."
    )

    @classmethod
    def of(cls, row: AgentRow) -> "Agent":
        """Return a row of the registry as it is shown."""
        named_otherwise = {
            "heartbeat_age_seconds": row.age_seconds,
            "resources": row.resource_metrics,
            "reserved": _reserved(row),
            "available": AvailableAmounts.on(row),
        }
        same = {name: getattr(row, name) for name in cls.model_fields.keys() - named_otherwise}
        return cls(**same, **named_otherwise)


class AgentPage(BaseModel):
    """Some agents, by pool and host; ``next`` asks for those that follow, ``null`` at the end."""

    agents: list[Agent]
    next: str | None


class Fleet(BaseModel):
    """The fleet in numbers. ``silent`` agents are counted with their status as well."""

    as_of: datetime
    degraded: bool = Field(description="We do not trust our own view now.")
    is_recording: bool = Field(
        description="Heartbeats are recorded now; if not, silence says nothing about an agent."
    )
    recording_age_seconds: float | None = Field(description="Since that was last proven.")
    trouble: str | None = Field(
        description="What is wrong on our side, for people; null if nothing is."
    )
    pools_in_outage: list[str] = Field(description="Most of each became silent at once.")
    online: int
    busy: int
    offline: int
    silent: int = Field(description="Online or busy, and their lease is over.")
    reservations: int = Field(description="Those that are held now.")
    waiting: int = Field(description="Questions that wait for room.")

    @classmethod
    def of(cls, summary: FleetSummary) -> "Fleet":
        """Return the registry's numbers as they are shown."""
        return cls(
            as_of=summary.as_of,
            degraded=summary.degraded,
            is_recording=summary.is_recording,
            recording_age_seconds=summary.recording_age_seconds,
            trouble=_trouble(summary),
            pools_in_outage=summary.pools_in_outage,
            online=summary.agents.get("online", 0),
            busy=summary.agents.get("busy", 0),
            offline=summary.agents.get("offline", 0),
            silent=summary.silent,
            reservations=summary.reservations,
            waiting=summary.waiting,
        )


def _trouble(summary: FleetSummary) -> str | None:
    if not summary.is_recording:
        return (
            "no heartbeats are recorded: no orchestrator runs, or it does not reach the broker or "
            "the database"
        )
    if summary.pools_in_outage:
        return f"most of {', '.join(summary.pools_in_outage)} became silent at once"
    if summary.degraded:
        return (
            "heartbeats are recorded again, and agents that have not spoken yet still have time to"
        )
    return None


def _reserved(row: AgentRow) -> list[ReservedPart]:
    parts = []
    for reservation_id, one in row.reserved.items():
        with suppress(KeyError, IndexError, TypeError, ValueError):  # others may have written it
            parts.append(
                ReservedPart(
                    reservation_id=UUID(reservation_id),
                    fence=one["fence"],
                    gpus=[ReservedGpu(**gpu) for gpu in one["chosen"]],
                    cpu_cores=int(one["cores"][0]),
                    memory_gb=one["memory"][0],
                )
            )
    return sorted(parts, key=lambda one: one.fence)
