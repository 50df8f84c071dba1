"""What goes into the registry and what comes out of it, as data."""

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from chiffon.messages import AgentStatus, StatusUpdate
from chiffon.registry.offers import RULES


def document(text: str) -> Any:
    """Return what a jsonb column holds, whoever wrote it.

    PostgreSQL keeps whole numbers of any length, Python reads 4,300 digits: longer ones are
    infinite here.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 400 else math.inf)


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
    """A change of an agent's status that is committed, told to exactly one orchestrator.

    ``reason`` is why it is offline: ``farewell``, ``missed 4 heartbeats``, ``connection closed``,
    ``never heard of``; ``None`` for the other states.
    """

    agent_id: UUID
    hostname: str | None
    pool_name: str
    status: AgentStatus
    reason: str | None


@dataclass(frozen=True, slots=True)
class Closing:
    """An agent's only connection, which closed.

    ``is_known``: we saw that connection being opened, and so know that it was the only one. Of
    others an agent is given time for another heartbeat. ``is_line``: it has opened another since,
    or dials again and again, so this tells only of the line.
    """

    agent_id: UUID
    seconds_ago: float
    is_known: bool
    is_line: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch: what changed nothing, and whose status changed."""

    stale: list[Stale]
    transitions: list[Transition]


@dataclass(frozen=True, slots=True)
class Swept:
    """What one pass changed: agents marked offline, pools that are held, pools that are let go."""

    transitions: list[Transition]
    frozen: list[str]
    thawed: list[str]


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent as the registry has it. Ages are seconds on the database's clock.

    ``clock_skew_seconds`` is by how much the agent's clock was ahead of the database's at its last
    heartbeat, less the time that this was on its way: about ``queue_delay_seconds``, which is
    measured with the canary and the same for all. ``lower_incarnations`` counts heartbeats of an
    earlier start, which changed nothing: many of them are a cloned disk, or a clock set back.
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
    held: dict[str, Any] = field(default_factory=dict)
    """What is reserved on it, by the ids of the reservations."""
    room: list[float] | None = None
    """What is left of VRAM, VRAM on one GPU, cores and memory, if anything is reserved."""


@dataclass(frozen=True, slots=True)
class Found:
    """The rows that match a capacity query, best first, at most one more than its limit.

    ``malformed`` names up to ten online agents whose metrics nobody can read.
    """

    as_of: datetime
    degraded: bool
    malformed: list[UUID]
    rows: list[asyncpg.Record]


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """The fleet in numbers: agents by status, and those alive by status whose lease is over.

    ``reservations`` are those that are held, ``waiting`` those who stand in line.
    """

    as_of: datetime
    degraded: bool
    frozen_pools: list[str]
    agents: dict[str, int]
    silent: int
    reservations: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Misfits:
    """Why agents do not fit a query.

    ``counts``: how many fail each rule first, in the order of the rules; of a rule about an
    amount, the most that one of them has, and its host. ``None`` counts those that fit.
    ``nearest``: who fails the fewest rules, with the names of those. ``relaxed``: who of those that
    fail only rules of the question does so by the least.
    """

    as_of: datetime
    counts: list[tuple[str | None, int, float | None, str | None]]
    nearest: list[dict[str, Any]]
    relaxed: dict[str, Any] | None = None


def agent_of(row: asyncpg.Record) -> AgentRow:
    """Return an agent from its row, whoever wrote it."""
    fields = dict(row)
    words = document(fields["capabilities"])  # others may have written it
    fields["capabilities"] = (
        [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    )
    fields["resource_metrics"] = document(fields["resource_metrics"])
    held = document(fields["held"] or "{}")
    fields["held"] = held if isinstance(held, dict) else {}
    if fields["age_seconds"] is not None:
        fields["age_seconds"] = max(fields["age_seconds"], 0.0)
    return AgentRow(**fields)


def misfits_of(row: asyncpg.Record) -> Misfits:
    """Return why agents do not fit from the one row that tells it."""
    order = {rule: place for place, rule in enumerate(RULES)}
    counts = [
        (one["rule"], one["agents"], one["most"], one["hostname"])
        for one in json.loads(row["counts"] or "[]")
    ]
    counts.sort(key=lambda one: -1 if one[0] is None else order[one[0]])
    return Misfits(
        row["as_of"],
        counts,
        json.loads(row["nearest"] or "[]"),
        json.loads(row["relaxed"] or "null"),
    )


def transition_of(update: StatusUpdate) -> Transition:
    """Return the change of status that a heartbeat made."""
    reason = "farewell" if update.is_farewell else None
    return Transition(update.agent_id, update.hostname, update.pool_name, update.status, reason)
