"""What goes into the registry and what comes out of it, as data."""

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
from pydantic_core import from_json

from chiffon.contract.messages import AgentStatus, StatusUpdate


def document(text: str) -> Any:
    """Return what a jsonb column holds, whoever wrote it.

    PostgreSQL keeps whole numbers of any length, Python reads 4,300 digits: longer ones are
    infinite here.
    """
    try:
        return from_json(text)  # a sixth of the time
    except ValueError:
        return json.loads(
            text, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf
        )


class Received(NamedTuple):
    """A heartbeat, and when this process received it: seconds of ``time.monotonic``."""

    update: StatusUpdate
    received: float


@dataclass(frozen=True, slots=True)
class Stale:
    """A heartbeat that changed nothing: an older one, or one held for longer than its lease.

    ``kept_incarnation`` above ``incarnation`` means that two processes use one agent id, or that
    a clock was set back; ``None`` if there is no such row, or it came to be at this moment.
    """

    agent_id: UUID
    incarnation: int
    kept_incarnation: int | None


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of an agent's status that is committed, returned to exactly one orchestrator.

    ``reason`` is why it is offline: ``farewell``, ``missed 4 heartbeats``, ``never heard of``;
    ``None`` for the other states.
    """

    agent_id: UUID
    hostname: str | None
    pool_name: str
    status: AgentStatus
    reason: str | None


class Reserved(NamedTuple):
    """An agent's columns ``reserved`` and ``resource_metrics``, of which the rest follows."""

    agent_id: UUID
    reserved: str
    resource_metrics: str


class Available(NamedTuple):
    """What can be taken of an agent: GiB over all GPUs and on one, whole cores, GiB of memory."""

    vram_gb: float
    single_gpu_vram_gb: float
    cores: float
    memory_gb: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch.

    ``stale`` changed nothing; of ``transitions`` the status changed; for ``reserved`` what
    reservations leave has to be computed anew.
    """

    stale: list[Stale]
    transitions: list[Transition]
    reserved: list[Reserved]


COLUMNS = 19


@dataclass(slots=True)
class Candidate:
    """An agent as it is judged for an offer or a reservation; columns as ``sql/offers.sql`` has it.

    ``free_*`` is what it reported, an unknown amount as 0; ``metrics_sound`` is ``None`` where
    nothing was reported. ``metrics`` and ``reserved`` are parsed when they are first needed.
    """

    agent_id: UUID
    hostname: str | None
    pool_name: str
    agent_type: str
    capabilities_text: str
    status: str
    drained: bool
    metrics_sound: bool | None
    is_fresh: bool | None
    is_hidden: bool
    free_vram_gb: float
    free_single_gpu_vram_gb: float
    free_cores: float
    free_memory_gb: float
    performance_score: float
    last_heartbeat_at: datetime | None
    age_seconds: float | None
    metrics_text: str | None
    reserved_text: str | None
    _metrics: Any = None

    @classmethod
    def of(cls, row: asyncpg.Record) -> "Candidate":
        """Return a candidate from the first columns of a row."""
        return cls(*row[:COLUMNS])

    @classmethod
    def examined(cls, row: asyncpg.Record) -> "Candidate":
        """Return a candidate from a row of ``examine``, whose metrics may be left out."""
        one = cls.of(row)
        if one.metrics_text is None:
            one._metrics = {"gpu_type": row["gpu_type"]}
        return one

    @property
    def gpu_type(self) -> str | None:
        """The vendor that its VRAM is of."""
        metrics = self.metrics
        value = metrics.get("gpu_type") if isinstance(metrics, dict) else None
        return value if isinstance(value, str) else None

    @property
    def metrics(self) -> Any:
        """The metrics as they were reported; whatever anybody wrote there."""
        if self._metrics is None and self.metrics_text is not None:
            self._metrics = document(self.metrics_text)
        return self._metrics

    @property
    def capabilities(self) -> list[str]:
        """The words that it is known by."""
        return words_of(self.capabilities_text)

    @property
    def reserved(self) -> dict[str, Any]:
        """What is reserved on it, by the ids of the reservations."""
        return mapping_of(self.reserved_text)


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates of a capacity question, best first.

    ``malformed`` names up to ten online agents whose metrics nobody can read.
    """

    as_of: datetime
    degraded: bool
    malformed: list[UUID]
    candidates: list[Candidate]


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent as the registry has it. Ages are seconds on the database's clock.

    ``clock_skew_seconds`` is by how much the agent's clock was ahead of the database's at its last
    heartbeat, less the time that this was on its way: about ``queue_delay_seconds``, which is
    measured with the canary and the same for all. ``lower_incarnations`` counts heartbeats of an
    earlier start, which changed nothing: many of them are a cloned disk, or a clock set back.
    ``is_silent``: its lease is over, or its connection closed.
    """

    agent_id: UUID
    agent_type: str
    pool_name: str
    capabilities: list[str]
    status: str
    hostname: str | None
    agent_version: str | None
    incarnation: int
    sequence: int
    sent_at: datetime | None
    interval_seconds: float
    lease_seconds: float
    drained: bool
    last_heartbeat_at: datetime | None
    resource_metrics: Any
    performance_score: float
    status_reason: str | None
    status_changed_at: datetime | None
    lower_incarnations: int
    lower_incarnation_at: datetime | None
    age_seconds: float | None
    clock_skew_seconds: float | None
    queue_delay_seconds: float | None
    is_silent: bool
    drain_reason: str | None = None
    drained_at: datetime | None = None
    drain_deadline: datetime | None = None
    reserved: dict[str, Any] = field(default_factory=dict)
    """What is reserved on it, by the ids of the reservations."""


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """The fleet in numbers: agents by status, and those alive by status whose lease is over.

    ``reservations`` are those that are held, ``waiting`` those in the wait queue. ``is_recording``:
    heartbeats reach the registry now; ``recording_age_seconds``: since that was last proven.
    """

    as_of: datetime
    degraded: bool
    is_recording: bool
    recording_age_seconds: float | None
    pools_in_outage: list[str]
    agents: dict[str, int]
    silent: int
    reservations: int
    waiting: int


def words_of(text: str) -> list[str]:
    """Return the capabilities of a row, whoever wrote them."""
    words = document(text)
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []


def mapping_of(text: str | None) -> dict[str, Any]:
    """Return what is reserved on an agent, whoever wrote it."""
    value = document(text) if text else {}
    return value if isinstance(value, dict) else {}


def agent_of(row: asyncpg.Record) -> AgentRow:
    """Return an agent from its row, whoever wrote it."""
    fields = dict(row)
    fields["capabilities"] = words_of(fields["capabilities"])
    fields["resource_metrics"] = document(fields["resource_metrics"])
    fields["reserved"] = mapping_of(fields["reserved"])
    if fields["age_seconds"] is not None:
        fields["age_seconds"] = max(fields["age_seconds"], 0.0)
    return AgentRow(**fields)


def transition_of(update: StatusUpdate) -> Transition:
    """Return the change of status that a heartbeat made."""
    reason = "farewell" if update.is_farewell else None
    return Transition(update.agent_id, update.hostname, update.pool_name, update.status, reason)
