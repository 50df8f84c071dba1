"""Who waits for room, first come first served, as PostgreSQL has them.

They are kept in a table and not in the memory of who took the question: whoever answers may die,
another one goes on, and nobody loses the place in the line.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from chiffon.messages import CapacityQuery, CapacityWait
from chiffon.registry import Registry, asked
from chiffon.registry.offers import ASKED, BEST_FIRST, OFFER, offered

ANSWERING_SECONDS = 5.0
"""For who answers to do so; then another one may."""

MOST_LOOKED_AT = 1_000
"""Waiting questions, from the head of the line, that one pass looks at."""

MOST_WAITING = 10_000
"""In the line; nobody else may join."""

_JOIN = f"""
INSERT INTO capacity_wait AS w (wait_id, question, deadline, reply)
SELECT $1, $2::jsonb, statement_timestamp() + $3::float8 * interval '1 second', $4::jsonb
 WHERE (SELECT count(*) FROM capacity_wait) < {MOST_WAITING}
ON CONFLICT (wait_id) DO UPDATE SET
  reply = excluded.reply, deadline = excluded.deadline, answering_until = NULL
RETURNING wait_id
"""  # noqa: S608

_WAITING = f"""
SELECT wait_id, question, reply, deadline <= statement_timestamp() AS is_over
  FROM capacity_wait ORDER BY place LIMIT {MOST_LOOKED_AT}
"""  # noqa: S608

_TAKE = """
UPDATE capacity_wait SET answering_until = statement_timestamp() + $2 * interval '1 second'
 WHERE wait_id IN (
   SELECT wait_id FROM capacity_wait
    WHERE wait_id = ANY($1::uuid[])
      AND coalesce(answering_until, '-infinity') <= statement_timestamp()
    ORDER BY place FOR UPDATE SKIP LOCKED)
RETURNING wait_id
"""

_LEAVE = "DELETE FROM capacity_wait WHERE wait_id = ANY($1::uuid[])"

# The same rules as those of FIND, of many questions at once.
_COLUMNS = {
    "min_gpu_vram_gb": "float8",
    "min_cpu_cores": "int",
    "min_memory_gb": "float8",
    "agent_type": "text",
    "pool_name": "text",
    "gpu_type": "text",
    "capabilities": "text",
    "min_single_gpu_vram_gb": "float8",
}
_ARRAYS = ", ".join(f"${n}::{kind}[]" for n, kind in enumerate(_COLUMNS.values(), 3))
_FIND_EACH = f"""
SELECT q.number, o.*, statement_timestamp() AS as_of,
       extract(epoch FROM statement_timestamp() - o.last_heartbeat_at)::float8 AS age_seconds
  FROM unnest($1::int[], {_ARRAYS})
         AS q (number, {", ".join(_COLUMNS)})
 CROSS JOIN LATERAL (
   SELECT {OFFER}, row_number() OVER (ORDER BY {BEST_FIRST}) AS place FROM agent_registry r
    WHERE {offered({name: f"q.{name}" for name in ASKED})}
    ORDER BY {BEST_FIRST} LIMIT $2
 ) o
 ORDER BY q.number, o.place
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who waits; ``reply`` is where the answer goes, in the words of who took the question."""

    wait_id: UUID
    question: CapacityWait
    reply: Mapping[str, Any]
    is_over: bool


class Line:
    """The line of those who wait. Safe to use from many tasks and processes at once.

    Every method raises what those of ``Registry`` do.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def join(self, wait_id: UUID, question: CapacityWait, reply: Mapping[str, Any]) -> bool:
        """Go to the end of the line; who is in it keeps the place and gets the answer elsewhere.

        Returns:
            Whether there was room: ``MOST_WAITING`` may wait.
        """
        rows = await self._registry.fetch(
            _JOIN, wait_id, question.model_dump_json(), question.timeout_seconds, json.dumps(reply)
        )
        return bool(rows)

    async def waiting(self) -> list[Waiting]:
        """Return who waits, in the order in which they came, at most ``MOST_LOOKED_AT``."""
        return [
            Waiting(
                row["wait_id"],
                CapacityWait.model_validate_json(row["question"]),
                json.loads(row["reply"]),
                row["is_over"],
            )
            for row in await self._registry.fetch(_WAITING)
        ]

    async def find_each(
        self, questions: Sequence[CapacityQuery], most: int
    ) -> list[list[asyncpg.Record]]:
        """Return for each question who fits, best first, at most so many: one statement."""
        arguments = [asked(question, most) for question in questions]
        columns = list(zip(*arguments, strict=True))
        del columns[7]  # how many is the same for all
        rows = await self._registry.fetch(_FIND_EACH, list(range(len(questions))), most, *columns)
        found: list[list[asyncpg.Record]] = [[] for _ in questions]
        for row in rows:
            found[row["number"]].append(row)
        return found

    async def take(self, wait_ids: Sequence[UUID]) -> set[UUID]:
        """Return those of them that are ours to answer now, within ``ANSWERING_SECONDS``."""
        rows = await self._registry.fetch(_TAKE, wait_ids, ANSWERING_SECONDS)
        return {row["wait_id"] for row in rows}

    async def leave(self, wait_ids: Sequence[UUID]) -> None:
        """Remove those that have their answer, or whom none can reach."""
        await self._registry.fetch(_LEAVE, wait_ids)
