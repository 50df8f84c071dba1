"""Why agents are not offered, in words.

The rules themselves are the SQL of ``registry.offers``: what offers an agent and what says why
it is not offered are the same conditions.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from chiffon.messages import (
    CapacityQuery,
    CapacityReserve,
    Explanation,
    Miss,
    Obstacle,
    Relaxation,
)
from chiffon.registry import Misfits

MOST_NAMED = 100
"""Of the agents that fit but for little."""

Asked = CapacityQuery | CapacityReserve


def explain(asked: Asked, misfits: Misfits) -> Explanation:
    """Put into words which rules agents break, and what could be asked for instead."""
    query = asked.needs() if isinstance(asked, CapacityReserve) else asked
    count = asked.count if isinstance(asked, CapacityReserve) else 1
    fitting = sum(number for rule, number, _, _ in misfits.counts if rule is None)
    obstacles = [
        Obstacle(
            rule=rule,
            agents=number,
            needed=_needed(query, rule),
            most=most,
            hostname=hostname if most is not None else None,
            message=_message(asked, query, rule, most, hostname),
        )
        for rule, number, most, hostname in misfits.counts
        if rule is not None
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


_AMOUNTS = {
    "min_gpu_vram_gb": "too little free VRAM",
    "min_single_gpu_vram_gb": "too little free VRAM on one GPU",
    "min_cpu_cores": "too few free cores",
    "min_memory_gb": "too little free memory",
}
_STATES = {
    "no_metrics": "report no metrics",
    "malformed_metrics": "have metrics that nobody can read",
}


def _needed(query: CapacityQuery, rule: str) -> float | None:
    return float(getattr(query, rule)) if rule in _AMOUNTS else None


def _message(
    asked: Asked,
    query: CapacityQuery,
    rule: str,
    most: float | None = None,
    hostname: str | None = None,
) -> str:
    if rule in _AMOUNTS:
        best = f" (best {_number(most)} of {_number(getattr(query, rule))}" if most else ""
        where = f" on {hostname})" if best and hostname else ")" if best else ""
        return f"{_AMOUNTS[rule]}{best}{where}"
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


def _miss(asked: Asked, query: CapacityQuery, found: Mapping[str, Any]) -> Miss:
    return Miss(
        agent_id=found["agent_id"],
        hostname=found["hostname"],
        pool_name=found["pool_name"],
        reasons=[_reason(asked, query, rule, found) for rule in found["broken"]],
    )


def _reason(asked: Asked, query: CapacityQuery, rule: str, found: Mapping[str, Any]) -> str:
    if rule not in _AMOUNTS:
        return _message(asked, query, rule)
    return f"{_AMOUNTS[rule]} ({_number(found[rule])} of {_number(getattr(query, rule))})"


def relaxation(asked: Asked, found: Mapping[str, Any] | None) -> Relaxation | None:
    """Return what to ask for instead, so that the agent that misses least is offered.

    Args:
        asked: The question.
        found: That agent, and the rules that it breaks; ``None`` where there is none.
    """
    is_one_gpu = isinstance(asked, CapacityReserve) and asked.gpus == 1
    if found is None or (is_one_gpu and "gpus" in found["broken"]):
        return None
    changes: dict[str, Any] = {}
    for rule in found["broken"]:
        changes.update(_changes(asked, rule, found, changes))
    if isinstance(asked, CapacityReserve):
        changes.update(_fewer(asked, found))
        try:
            CapacityReserve.model_validate({**asked.model_dump(), **changes})
        except ValidationError:
            return None  # nothing would be left to reserve
    words = ", ".join(f"{name} {_spoken(value)}" for name, value in changes.items())
    who = found["hostname"] or f"agent {found['agent_id']}"
    return Relaxation(
        changes=changes,
        agent_id=found["agent_id"],
        hostname=found["hostname"],
        message=f"with {words}, {who} would fit",
    )


def _changes(
    asked: Asked, rule: str, found: Mapping[str, Any], so_far: Mapping[str, Any]
) -> dict[str, Any]:
    if rule == "agent_id":
        return {"agent_id": None}
    if rule == "gpus":
        return {"gpus": 1}
    if rule == "capabilities":
        words = found["capabilities"]
        return {
            rule: [word for word in asked.capabilities if isinstance(words, list) and word in words]
        }
    if rule not in _AMOUNTS:
        return {rule: _taken_over(rule, found[rule])}
    has = found[rule] or 0.0
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


def _fewer(asked: CapacityReserve, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return one GPU and one agent where it is not known that more of them have so much."""
    fewer: dict[str, Any] = {"count": 1} if asked.count > 1 else {}
    if asked.gpus > 1 and {"min_gpu_vram_gb", "min_single_gpu_vram_gb"} & set(found["broken"]):
        single = math.floor((found["min_single_gpu_vram_gb"] or 0.0) * 1_000) / 1_000
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
