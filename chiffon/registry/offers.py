"""The SQL of the offers: who is offered, and who is not and why.

The statements are put together from constants of this file, and from nothing else.
"""

import json
from collections.abc import Mapping
from typing import Any

from chiffon.messages import CapacityQuery, CapacityReserve

DEGRADED = """coalesce((SELECT fresh_at NOT BETWEEN statement_timestamp() - interval '5 seconds'
                                          AND statement_timestamp() + interval '1 second'
                       OR grace_until > statement_timestamp() FROM ingest_path), true)"""

FRESH = (
    "r.last_heartbeat_at > statement_timestamp() - r.lease_seconds * interval '1 second'"
    " AND r.last_heartbeat_at < statement_timestamp() + interval '5 seconds'"
)
_STATE = {
    "offline": "r.status <> 'offline'",
    "busy": "r.status <> 'busy'",
    "drained": "NOT r.drained",
    "silent": FRESH,
    "no_metrics": "r.metrics_sound IS NOT NULL",
    "malformed_metrics": "coalesce(r.metrics_sound, true)",
}
# What is free, less what is reserved. The index of the offers has the same expressions.
_FREE = {
    "min_gpu_vram_gb": "coalesce(r.room[1], r.free_vram_gb)",
    "min_single_gpu_vram_gb": "coalesce(r.room[2], r.free_single_gpu_vram_gb)",
    "min_cpu_cores": "coalesce(r.room[3], r.free_cores)",
    "min_memory_gb": "coalesce(r.room[4], r.free_memory_gb)",
}
BEST_FIRST = (
    f"{_FREE['min_gpu_vram_gb']} DESC, {_FREE['min_cpu_cores']} DESC,"
    " r.performance_score DESC, r.agent_id"
)


def scope(asked: Mapping[str, str]) -> dict[str, str]:
    """Return the rules about who an agent is, by the names of the fields of a query.

    Args:
        asked: The SQL of what is asked for, by the same names.
    """
    pool, kind, vendor, words = (
        asked[name] for name in ("pool_name", "agent_type", "gpu_type", "capabilities")
    )
    return {
        "pool_name": f"({pool}::text IS NULL OR r.pool_name = {pool})",
        "agent_type": f"({kind}::text IS NULL OR r.agent_type = {kind})",
        "gpu_type": f"({vendor}::text IS NULL OR r.resource_metrics ->> 'gpu_type' = {vendor})",
        "capabilities": f"r.capabilities @> {words}::jsonb",
    }


def needs(asked: Mapping[str, str]) -> dict[str, str]:
    """Return the rules about amounts, as ``scope`` does."""
    return {name: f"{free} >= {asked[name]}" for name, free in _FREE.items()}


def offered(asked: Mapping[str, str], rules: Mapping[str, str] | None = None) -> str:
    """Return the SQL of what an agent ``r`` must be to be offered, in the form an index serves.

    Args:
        asked: The SQL of what is asked for, by the names of the fields of a query.
        rules: The rules about who it is, if they are others than ``scope`` returns.
    """
    return " AND ".join(
        [
            "r.status = 'online' AND r.metrics_sound AND NOT r.drained",
            "r.last_heartbeat_at IS DISTINCT FROM r.lapsed_heartbeat_at",
            FRESH,
            *needs(asked).values(),
            *(rules or scope(asked)).values(),
        ]
    )


ASKED = {
    "min_gpu_vram_gb": "$1",
    "min_cpu_cores": "$2",
    "min_memory_gb": "$3",
    "agent_type": "$4",
    "pool_name": "$5",
    "gpu_type": "$6",
    "capabilities": "$7",
    "min_single_gpu_vram_gb": "$9",
}
"""The fields of a query by their places among a statement's arguments; $8 is how many rows."""


def degraded(pool: str) -> str:
    """Return the SQL that tells whether we trust our view of a pool, or of all if that is NULL."""
    return (
        f"({DEGRADED} OR EXISTS (SELECT FROM pool_state WHERE thawed_at IS NULL"
        f" AND ({pool}::text IS NULL OR pool_state.pool_name = {pool})))"
    )


OFFER = """r.agent_id, r.agent_type, r.pool_name, r.hostname, r.status, r.resource_metrics,
         r.performance_score, r.last_heartbeat_at, r.room"""


ANY_POOL, OF_POOL = "$5::text IS NULL", "r.pool_name = $5"


def within(of_pool: str | None = None) -> str:
    """Return the SQL of ``offered`` for a statement's arguments.

    Args:
        of_pool: The rule about pools, for statements that are planned once; else the arguments say.
    """
    rules = scope(ASKED)
    return offered(ASKED, rules if of_pool is None else {**rules, "pool_name": of_pool})


# In the first row alone: to read it from each takes a tenth of a question's time.
_HEADER = ", ".join(
    f"CASE WHEN place > 1 THEN NULL ELSE header.{name} END AS {name}"
    for name in ("as_of", "degraded", "malformed")
)


def _find(of_pool: str | None = None) -> str:
    return f"""
WITH header AS (
  SELECT statement_timestamp() AS as_of,
         {degraded("$5")} AS degraded,
         ARRAY(SELECT agent_id FROM agent_registry
                WHERE NOT metrics_sound AND status = 'online' LIMIT 10
              ) AS malformed
), offers AS (
  SELECT {OFFER}, row_number() OVER (ORDER BY {BEST_FIRST}) AS place
    FROM agent_registry r WHERE {within(of_pool)} ORDER BY {BEST_FIRST} LIMIT $8
)
SELECT {_HEADER}, offers.*,
       extract(epoch FROM header.as_of - offers.last_heartbeat_at)::float8 AS age_seconds
  FROM header LEFT JOIN offers ON true
 ORDER BY place
"""  # noqa: S608


FIND = _find()
# With plans that are made once, which takes half as long: in the order of an index, whatever is
# asked. So each of the two indexes has a statement of its own.
FIND_IN_ORDER, FIND_IN_POOL = _find(ANY_POOL), _find(OF_POOL)
IN_ORDER = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
}
"""Settings of a session for these and for claims: the planner does not know how few rows are
asked for."""


def has_rare_words(query: CapacityQuery) -> bool:
    """Return whether few may have what is asked for: then reading in order may be the long way."""
    return (
        bool(query.capabilities)
        or query.gpu_type is not None
        # What agents are unless they say otherwise.
        or query.agent_type not in (None, "desktop")
    )


# FIND offers who keeps all rules, EXPLAIN tells which of them somebody breaks. What a reservation
# asks for beyond a query's amounts is looked at where nothing else is broken: it costs more.
TAKE = (
    "chiffon_take(r.resource_metrics, r.held, $11::int, $12::float8::numeric,"
    " $13::float8::numeric, $14::float8::numeric)"
)
"""What a reservation would take on an agent ``r``, NULL if it does not fit."""

_RULES = {
    "agent_id": "($10::uuid IS NULL OR r.agent_id = $10)",
    **scope(ASKED),
    **_STATE,
    **needs(ASKED),
    "gpus": f"CASE WHEN $11::int > 0 AND {offered(ASKED)} THEN {TAKE} IS NOT NULL ELSE true END",
}
RULES = tuple(_RULES)
RELAXABLE = ("agent_id", *scope(ASKED), *_FREE, "gpus")
"""The rules that who asks can change: the others are the agents' state."""

_JUDGED = ", ".join(
    f"CASE WHEN NOT coalesce({rule}, false) THEN '{name}' END" for name, rule in _RULES.items()
)


def _shown(name: str, *keys: str) -> str:
    """Return the SQL for what people are told of an amount: unknown counts as 0, and is not 0."""
    kinds = ", ".join(f"jsonb_typeof(r.resource_metrics -> '{key}')" for key in keys)
    return f"CASE WHEN 'number' IN ({kinds}) THEN {_FREE[name]} END AS {name}"


_SHOWN = ", ".join(
    [
        _shown("min_gpu_vram_gb", "gpu_vram_available_gb"),
        _shown("min_single_gpu_vram_gb", "gpu_vram_max_available_gb", "gpu_vram_available_gb"),
        _shown("min_cpu_cores", "cpu_cores_available"),
        _shown("min_memory_gb", "memory_available_gb"),
    ]
)
_HAS = " ".join(f"WHEN '{name}' THEN {name}" for name in _FREE)
_SHORTFALL = " + ".join(
    f"CASE WHEN '{name}' = ANY(broken)"
    f" THEN 1 - coalesce(coalesce({name}, 0) / nullif({ASKED[name]}, 0), 0) ELSE 0 END"
    for name in _FREE
)

EXPLAIN = f"""
WITH judged AS MATERIALIZED (
  SELECT r.agent_id, r.hostname, r.pool_name, r.agent_type, r.capabilities, {_SHOWN},
         r.resource_metrics -> 'gpu_type' AS gpu_type,
         row_number() OVER (ORDER BY {BEST_FIRST}) AS place,
         array_remove(ARRAY[{_JUDGED}], NULL) AS broken
    FROM agent_registry r
), counted AS (
  SELECT broken[1] AS rule, count(*) AS agents, max(has) AS most,
         (array_agg(hostname ORDER BY has DESC NULLS LAST))[1] AS hostname
    FROM (SELECT *, CASE broken[1] {_HAS} END AS has FROM judged) j GROUP BY broken[1]
), nearest AS (
  SELECT * FROM judged WHERE broken <> '{{}}'
   ORDER BY cardinality(broken), place LIMIT $8
), relaxed AS (
  SELECT * FROM judged
   WHERE broken <> '{{}}' AND broken <@ ARRAY[{", ".join(f"'{name}'" for name in RELAXABLE)}]
   ORDER BY cardinality(broken), {_SHORTFALL}, place LIMIT 1
)
SELECT statement_timestamp() AS as_of,
       (SELECT json_agg(counted) FROM counted) AS counts,
       (SELECT json_agg(nearest ORDER BY cardinality(broken), place) FROM nearest) AS nearest,
       (SELECT row_to_json(relaxed) FROM relaxed) AS relaxed
"""  # noqa: S608


def asked(query: CapacityQuery, most: int) -> tuple[Any, ...]:
    """Return the arguments of a statement that looks for offers, at most so many."""
    return (
        query.min_gpu_vram_gb,
        query.min_cpu_cores,
        query.min_memory_gb,
        query.agent_type,
        query.pool_name,
        query.gpu_type,
        json.dumps(query.capabilities),
        most,
        query.min_single_gpu_vram_gb,
    )


def taken(reserve: CapacityReserve | None) -> tuple[Any, ...]:
    """Return the arguments that follow them: what is to be taken on each agent."""
    if reserve is None:
        return (None, 0, 0.0, 0.0, 0.0)
    return (
        reserve.agent_id,
        reserve.gpus,
        reserve.gpu_vram_gb,
        float(reserve.cpu_cores),
        reserve.memory_gb,
    )
