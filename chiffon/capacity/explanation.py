"""Why agents are not offered, in words. The rules are those of ``room``."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
from pydantic import ValidationError

from chiffon.capacity.room import AMOUNTS, RELAXABLE, RULES, Wanted, available, broken
from chiffon.contract.messages import (
    CapacityQuery,
    CapacityReserve,
    Explanation,
    Miss,
    Obstacle,
    Relaxation,
)
from chiffon.registry.rows import Available, Candidate, words_of

MOST_NAMED = 100
"""Of the agents that fit but for little."""

Asked = CapacityQuery | CapacityReserve


@dataclass(frozen=True, slots=True)
class Misfit:
    """An agent that breaks rules, and what it has of each amount: ``None`` if it does not tell."""

    agent_id: UUID
    hostname: str | None
    pool_name: str
    agent_type: str
    gpu_type: str | None
    capabilities_text: str
    broken: Sequence[str]
    has: Mapping[str, float | None]
    order: tuple[Any, ...]
    """Smaller is better, in the order of the offers."""


@dataclass(slots=True)
class Count:
    """How many agents break a rule first, and the most that one of them has."""

    agents: int = 0
    most: float | None = None
    hostname: str | None = None


class Misfits:
    """Counts why agents do not fit, as they are examined.

    Args:
        wanted: What they must have.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._counts: dict[str, Count] = {}
        self.as_of = datetime.now(UTC)
        self.fitting = 0
        self.nearest: list[Misfit] = []
        self.other_types: Counter[str] = Counter()
        """Of those that would fit if only they were of the type that is asked for: their types."""
        self.relaxed: Misfit | None = None
        """Who of those that break only rules of the question does so by the least."""

    @property
    def counts(self) -> list[tuple[str, Count]]:
        """How many agents break each rule first, in the order of the rules."""
        return [(rule, self._counts[rule]) for rule in RULES if rule in self._counts]

    def add(self, rows: Iterable[asyncpg.Record]) -> None:
        """Examine some agents; rows as ``examine`` in ``sql/offers.sql`` has them."""
        found: list[Misfit] = []
        for row in rows:
            self.as_of = row["as_of"]
            candidate = Candidate.examined(row)
            rules = broken(candidate, self._wanted)
            if rules:
                found.append(_misfit(candidate, rules, row))
                self._count(found[-1])
            else:
                self.fitting += 1
        if not found:
            return
        self.nearest = heapq.nsmallest(
            MOST_NAMED, [*self.nearest, *found], key=lambda one: (len(one.broken), one.order)
        )
        relaxable = [one for one in found if RELAXABLE.issuperset(one.broken)]
        if self.relaxed is not None:
            relaxable.append(self.relaxed)
        if relaxable:
            self.relaxed = min(relaxable, key=self._distance)

    def _count(self, one: Misfit) -> None:
        if list(one.broken) == ["agent_type"]:
            self.other_types[one.agent_type] += 1
        count = self._counts.setdefault(one.broken[0], Count())
        count.agents += 1
        has = one.has.get(one.broken[0])
        if has is not None and (count.most is None or has > count.most):
            count.most, count.hostname = has, one.hostname

    def _distance(self, one: Misfit) -> tuple[Any, ...]:
        """Return how much has to be given up: the fewest rules, then the least shares."""
        shares = 0.0
        for rule in AMOUNTS.keys() & set(one.broken):
            asked = getattr(self._wanted.needs, rule)
            shares += 1 - ((one.has[rule] or 0.0) / asked if asked else 0.0)
        return len(one.broken), shares, one.order


def _misfit(candidate: Candidate, rules: Sequence[str], row: asyncpg.Record) -> Misfit:
    has = available(candidate)
    return Misfit(
        candidate.agent_id,
        candidate.hostname,
        candidate.pool_name,
        candidate.agent_type,
        candidate.gpu_type,
        candidate.capabilities_text,
        rules,
        # Unknown counts as 0, and is not 0.
        {
            rule: getattr(has, name) if row[f"knows_{name}"] else None
            for rule, name in AMOUNTS.items()
        },
        _order(candidate, has),
    )


def _order(candidate: Candidate, has: Available) -> tuple[Any, ...]:
    return -has.vram_gb, -has.cores, -candidate.performance_score, candidate.agent_id


def explain(asked: Asked, misfits: Misfits) -> Explanation:
    """Put into words which rules agents break, and what could be asked for instead."""
    query = asked.needs() if isinstance(asked, CapacityReserve) else asked
    count = asked.count if isinstance(asked, CapacityReserve) else 1
    fitting = misfits.fitting
    obstacles = [
        Obstacle(
            rule=rule,
            agents=found.agents,
            needed=_needed(query, rule),
            most=found.most,
            hostname=found.hostname if found.most is not None else None,
            message=_message(asked, query, rule, found.most, found.hostname)
            + (_of_other_types(misfits.other_types) if rule == "agent_type" else ""),
        )
        for rule, found in misfits.counts
    ]
    agents = fitting + sum(one.agents for one in obstacles)
    parts = [f"{fitting} of {count} fit" if count > 1 else f"{fitting} fit"] if fitting else []
    parts += [f"{one.agents} {one.message}" for one in obstacles]
    return Explanation(
        as_of=misfits.as_of,
        agents=agents,
        fitting=fitting,
        summary=f"{_counted(agents)}: {', '.join(parts)}" if agents else "no agent is known",
        obstacles=obstacles,
        nearest=[_miss(asked, query, one) for one in misfits.nearest],
        relaxation=_fewer_agents(asked, fitting)
        or (None if fitting >= count else relaxation(asked, misfits.relaxed)),
    )


_WORDS = {
    "min_gpu_vram_gb": "too little free VRAM",
    "min_single_gpu_vram_gb": "too little free VRAM on one GPU",
    "min_cpu_cores": "too few free cores",
    "min_memory_gb": "too little free memory",
}
_STATES = {
    "disconnected": "whose connection closed",
    "no_metrics": "report no metrics",
    "malformed_metrics": "have metrics that nobody can read",
}


def _needed(query: CapacityQuery, rule: str) -> float | None:
    return float(getattr(query, rule)) if rule in AMOUNTS else None


def _message(
    asked: Asked,
    query: CapacityQuery,
    rule: str,
    most: float | None = None,
    hostname: str | None = None,
) -> str:
    if rule in AMOUNTS:
        best = f" (best {_number(most)} of {_number(getattr(query, rule))}" if most else ""
        where = f" on {hostname})" if best and hostname else ")" if best else ""
        return f"{_WORDS[rule]}{best}{where}"
    wanted = {
        "pool_name": f"not in pool {query.pool_name}",
        "agent_type": f"not of type {query.agent_type}",
        "gpu_type": f"without {query.gpu_type} GPUs",
        "capabilities": f"without {' and '.join(query.capabilities)}",
    }
    if isinstance(asked, CapacityReserve):
        several = f"{asked.gpus} GPUs, each" if asked.gpus > 1 else "a GPU"
        wanted["agent_id"] = f"not agent {asked.agent_id}"
        wanted["gpus"] = f"without {several} with {_number(asked.gpu_vram_gb)} GiB to reserve"
    return wanted.get(rule) or _STATES.get(rule, rule)


def _of_other_types(types: Mapping[str, int]) -> str:
    """Return how many agents the filter for a type keeps from being offered, and nothing else."""
    if not types:
        return ""
    each = ", ".join(f"{count} of type {name}" for name, count in sorted(types.items()))
    return f" ({each} would fit)"


def _miss(asked: Asked, query: CapacityQuery, found: Misfit) -> Miss:
    return Miss(
        agent_id=found.agent_id,
        hostname=found.hostname,
        pool_name=found.pool_name,
        reasons=[_reason(asked, query, rule, found) for rule in found.broken],
    )


def _reason(asked: Asked, query: CapacityQuery, rule: str, found: Misfit) -> str:
    if rule not in AMOUNTS:
        return _message(asked, query, rule)
    return f"{_WORDS[rule]} ({_number(found.has[rule])} of {_number(getattr(query, rule))})"


def relaxation(asked: Asked, found: Misfit | None) -> Relaxation | None:
    """Return what to ask for instead, so that the agent that misses least is offered.

    Args:
        asked: The question.
        found: That agent, and the rules that it breaks; ``None`` where there is none.
    """
    is_one_gpu = isinstance(asked, CapacityReserve) and asked.gpus == 1
    if found is None or (is_one_gpu and "gpus" in found.broken):
        return None
    changes: dict[str, Any] = {}
    for rule in found.broken:
        changes.update(_changes(asked, rule, found, changes))
    if isinstance(asked, CapacityReserve):
        changes.update(_fewer(asked, found))
        try:
            CapacityReserve.model_validate({**asked.model_dump(), **changes})
        except ValidationError:
            return None  # nothing would be left to reserve
    words = ", ".join(f"{name} {_spoken(value)}" for name, value in changes.items())
    who = found.hostname or f"agent {found.agent_id}"
    return Relaxation(
        changes=changes,
        agent_id=found.agent_id,
        hostname=found.hostname,
        message=f"with {words}, {who} would fit",
    )


def _changes(asked: Asked, rule: str, found: Misfit, so_far: Mapping[str, Any]) -> dict[str, Any]:
    if rule == "agent_id":
        return {"agent_id": None}
    if rule == "gpus":
        return {"gpus": 1}
    if rule == "capabilities":
        words = words_of(found.capabilities_text)
        return {rule: [word for word in asked.capabilities if word in words]}
    if rule not in AMOUNTS:
        return {rule: _taken_over(rule, getattr(found, rule))}
    has = found.has[rule] or 0.0
    if rule == "min_cpu_cores":
        most: float = math.floor(has)
    else:
        # Nobody reads more digits, and what is shown must be what can be asked for.
        most = math.floor(has * 1_000) / 1_000
    changes = {rule: most} if getattr(asked, rule) > most else {}
    if isinstance(asked, CapacityReserve):
        name, each = {
            "min_gpu_vram_gb": ("gpu_vram_gb", math.floor(most / asked.gpus * 1_000) / 1_000),
            "min_single_gpu_vram_gb": ("gpu_vram_gb", most),
            "min_cpu_cores": ("cpu_cores", most),
            "min_memory_gb": ("memory_gb", most),
        }[rule]
        if getattr(asked, name) > each:
            changes[name] = min(each, so_far.get(name, each))
    return changes


def _fewer_agents(asked: Asked, fitting: int) -> Relaxation | None:
    """Return what to ask for where some agents fit, and not so many or not so far apart."""
    if not isinstance(asked, CapacityReserve) or not fitting:
        return None
    changes: dict[str, Any] = {"count": fitting} if fitting < asked.count else {}
    if asked.distinct_hosts and asked.count > 1:
        changes["distinct_hosts"] = False
    if not changes:
        return None
    words = ", ".join(
        "on one host" if name == "distinct_hosts" else f"{name} {value}"
        for name, value in changes.items()
    )
    return Relaxation(
        changes=changes, agent_id=None, hostname=None, message=f"with {words}, it would fit"
    )


def _fewer(asked: CapacityReserve, found: Misfit) -> dict[str, Any]:
    """Return one GPU and one agent where it is not known that more of them have so much."""
    fewer: dict[str, Any] = {"count": 1} if asked.count > 1 else {}
    if asked.gpus > 1 and {"min_gpu_vram_gb", "min_single_gpu_vram_gb"} & set(found.broken):
        single = math.floor((found.has["min_single_gpu_vram_gb"] or 0.0) * 1_000) / 1_000
        fewer |= {"gpus": 1, "gpu_vram_gb": min(asked.gpu_vram_gb, single)}
    return fewer


def _taken_over(rule: str, value: Any) -> Any:
    """Return an agent's own pool, type or vendor, if it is one that can be asked for."""
    try:
        CapacityQuery.model_validate({rule: value})
    except ValidationError:
        return None
    return value


def _spoken(value: Any) -> str:
    if value is None:
        return "any"
    if isinstance(value, list):
        return " and ".join(value) or "none"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    # Never rounded up: 39.9996 is too little where 40 is asked for, and must not read as 40.
    return f"{math.floor(value * 1_000) / 1_000:.3f}".rstrip("0").rstrip(".")


def _counted(agents: int) -> str:
    return f"{agents} agent" if agents == 1 else f"{agents} agents"
