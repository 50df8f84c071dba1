"""Why agents are not offered, in words.

The rules themselves are the SQL of ``registry.statements``: what offers an agent and what says why
it is not offered are the same conditions.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from chiffon.messages import CapacityQuery
from chiffon.registry import Misfits

MOST_NAMED = 100
"""Of the agents that fit but for little."""


class Obstacle(BaseModel):
    """A rule that keeps agents from being offered; each agent is counted once, with its first."""

    rule: str
    agents: int
    needed: float | None = Field(description="For rules about an amount.")
    most: float | None = Field(description="The most that one of them has.")
    hostname: str | None = Field(description="Who has it.")
    message: str


class Miss(BaseModel):
    """An agent that is not offered, and every reason why."""

    agent_id: UUID
    hostname: str | None
    pool_name: str
    reasons: list[str]


class Explanation(BaseModel):
    """What became of every agent of the fleet in the light of one question.

    ``agents`` = ``fitting`` + the sum over ``obstacles``. ``nearest`` names up to 100 of those
    that are not offered, those with the fewest reasons first.
    """

    as_of: datetime
    agents: int
    fitting: int
    summary: str
    obstacles: list[Obstacle]
    nearest: list[Miss]


def explain(query: CapacityQuery, misfits: Misfits) -> Explanation:
    """Put into words which rules agents break."""
    fitting = sum(count for rule, count, _, _ in misfits.counts if rule is None)
    obstacles = [
        Obstacle(
            rule=rule,
            agents=count,
            needed=_needed(query, rule),
            most=most,
            hostname=hostname if most is not None else None,
            message=_message(query, rule, most, hostname),
        )
        for rule, count, most, hostname in misfits.counts
        if rule is not None
    ]
    agents = fitting + sum(one.agents for one in obstacles)
    parts = [f"{fitting} fit"] if fitting else []
    parts += [f"{one.agents} {one.message}" for one in obstacles]
    return Explanation(
        as_of=misfits.as_of,
        agents=agents,
        fitting=fitting,
        summary=f"{_counted(agents)}: {', '.join(parts)}" if agents else "no agent is known",
        obstacles=obstacles,
        nearest=[_miss(query, one) for one in misfits.nearest],
    )


_AMOUNTS = {
    "min_gpu_vram_gb": ("too little free VRAM", "free_vram_gb"),
    "min_single_gpu_vram_gb": ("too little free VRAM on one GPU", "free_single_gpu_vram_gb"),
    "min_cpu_cores": ("too few free cores", "free_cores"),
    "min_memory_gb": ("too little free memory", "free_memory_gb"),
}
_STATES = {
    "no_metrics": "report no metrics",
    "malformed_metrics": "have metrics that nobody can read",
}


def _needed(query: CapacityQuery, rule: str) -> float | None:
    return float(getattr(query, rule)) if rule in _AMOUNTS else None


def _message(
    query: CapacityQuery, rule: str, most: float | None = None, hostname: str | None = None
) -> str:
    if rule in _AMOUNTS:
        best = f" (best {_number(most)} of {_number(getattr(query, rule))}" if most else ""
        where = f" on {hostname})" if best and hostname else ")" if best else ""
        return f"{_AMOUNTS[rule][0]}{best}{where}"
    wanted = {
        "pool_name": f"not in pool {query.pool_name}",
        "agent_type": f"not of type {query.agent_type}",
        "gpu_type": f"without {query.gpu_type} GPUs",
        "capabilities": f"without {' and '.join(query.capabilities)}",
    }
    return wanted.get(rule) or _STATES.get(rule, rule)


def _miss(query: CapacityQuery, found: Mapping[str, Any]) -> Miss:
    return Miss(
        agent_id=found["agent_id"],
        hostname=found["hostname"],
        pool_name=found["pool_name"],
        reasons=[_reason(query, rule, found) for rule in found["broken"]],
    )


def _reason(query: CapacityQuery, rule: str, found: Mapping[str, Any]) -> str:
    if rule not in _AMOUNTS:
        return _message(query, rule)
    name, column = _AMOUNTS[rule]
    return f"{name} ({_number(found[column])} of {_number(getattr(query, rule))})"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    # Never rounded up: 39.9996 is too little where 40 is asked for, and must not read as 40.
    return f"{math.floor(value * 1_000) / 1_000:.3f}".rstrip("0").rstrip(".")


def _counted(agents: int) -> str:
    return f"{agents} agent" if agents == 1 else f"{agents} agents"
