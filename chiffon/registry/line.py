"""Who waits for room, first come first served, as PostgreSQL has them.

They are kept in a table and not in the memory of who took the question: whoever answers may die,
another one goes on, and nobody loses the place in the line.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

from chiffon.messages import CapacityQuery, CapacityWait
from chiffon.registry import Found, Registry
from chiffon.registry.offers import ASKED, BEST_FIRST, OFFER, asked, degraded, offered

log = logging.getLogger(__name__)

ANSWERING_SECONDS = 5.0
"""For who answers to do so; then another one may."""

MOST_QUESTIONS = 100
"""Different questions that one pass looks at, of those who came first."""

MOST_OF_ONE = 20
"""Who ask the same that one pass looks at: those behind them would get nothing anyway."""

MOST_TRIES = 5
"""To send somebody the answer."""

OFFERED_SECONDS = 1.0
"""For who was offered room to take it, before others are offered it."""

KEPT_SECONDS = 5.0
"""For how long who was offered room may come back to the same place, if another was faster."""

MOST_WAITING = 10_000
"""In the line; nobody else may join."""

_JOIN = f"""
INSERT INTO capacity_wait AS w (wait_id, question, deadline, reply)
SELECT $1, $2::jsonb, statement_timestamp() + $3::float8 * interval '1 second', $4::jsonb
 WHERE (SELECT count(*) FROM capacity_wait) < {MOST_WAITING}
    OR EXISTS (SELECT FROM capacity_wait WHERE wait_id = $1)
ON CONFLICT (wait_id) DO UPDATE SET
  reply = excluded.reply, question = excluded.question, deadline = excluded.deadline,
  answering_until = NULL, tries = 0, offered_at = NULL, offered_agent_id = NULL
RETURNING wait_id
"""  # noqa: S608

# Those whose time is up, and those who came first of the questions that came first.
_WAITING = f"""
WITH waiting AS (
  SELECT wait_id, question, reply, place, deadline <= statement_timestamp() AS is_over,
         CASE jsonb_typeof(question) WHEN 'object'
           THEN question - ARRAY['timeout_seconds', 'wait_id', 'limit'] END AS needs
    FROM capacity_wait WHERE offered_at IS NULL
), ranked AS (
  SELECT *, row_number() OVER (PARTITION BY needs ORDER BY place) AS among_its_kind,
         min(place) OVER (PARTITION BY needs) AS first_of_its_kind
    FROM waiting
), numbered AS (
  SELECT *, dense_rank() OVER (ORDER BY first_of_its_kind) AS kind FROM ranked
)
SELECT wait_id, question, reply, is_over, kind FROM numbered
 WHERE is_over OR kind <= {MOST_QUESTIONS} AND among_its_kind <= {MOST_OF_ONE}
 ORDER BY place
"""  # noqa: S608

_SPOKEN_FOR = """
SELECT DISTINCT offered_agent_id FROM capacity_wait
 WHERE offered_at > statement_timestamp() - $1 * interval '1 second'
   AND offered_agent_id IS NOT NULL
"""

_TAKE = """
UPDATE capacity_wait SET tries = tries + 1,
       answering_until = statement_timestamp() + $2 * interval '1 second'
 WHERE wait_id IN (
   SELECT wait_id FROM capacity_wait
    WHERE wait_id = ANY($1::uuid[]) AND offered_at IS NULL
      AND coalesce(answering_until, '-infinity') <= statement_timestamp()
    ORDER BY place FOR UPDATE SKIP LOCKED)
RETURNING wait_id, tries
"""

_OFFERED = """
UPDATE capacity_wait w SET offered_at = statement_timestamp(), offered_agent_id = o.agent_id
  FROM unnest($1::uuid[], $2::uuid[]) AS o (wait_id, agent_id) WHERE w.wait_id = o.wait_id
"""

_LEAVE = """
DELETE FROM capacity_wait
 WHERE wait_id = ANY($1::uuid[])
    OR offered_at < statement_timestamp() - $2 * interval '1 second'
"""

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
SELECT q.number, o.*, statement_timestamp() AS as_of, {degraded("q.pool_name")} AS degraded,
       extract(epoch FROM statement_timestamp() - o.last_heartbeat_at)::float8 AS age_seconds
  FROM unnest($1::int[], {_ARRAYS})
         AS q (number, {", ".join(_COLUMNS)})
  LEFT JOIN LATERAL (
   SELECT {OFFER}, row_number() OVER (ORDER BY {BEST_FIRST}) AS place FROM agent_registry r
    WHERE {offered({name: f"q.{name}" for name in ASKED})}
    ORDER BY {BEST_FIRST} LIMIT $2
 ) o ON true
 ORDER BY q.number, o.place
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Reply:
    """Where an answer goes, and which question it belongs to."""

    exchange: str
    key: str
    correlation_id: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.exchange, str) or not isinstance(self.key, str):
            raise TypeError("an exchange and a key are texts")


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who waits.

    ``is_over``: the time is up. ``kind``: the same for all who ask the same, in the order in which
    the first of each came, from 1.
    """

    wait_id: UUID
    question: CapacityWait
    reply: Reply
    is_over: bool
    kind: int


class Line:
    """The line of those who wait. Safe to use from many tasks and processes at once.

    Every method raises what those of ``Registry`` do.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def join(self, wait_id: UUID, question: CapacityWait, reply: Reply) -> bool:
        """Go to the end of the line; who is in it keeps the place and gets the answer elsewhere.

        Returns:
            Whether there was room: ``MOST_WAITING`` may wait.
        """
        rows = await self._registry.fetch(
            _JOIN,
            wait_id,
            question.model_dump_json(),
            question.timeout_seconds,
            json.dumps(asdict(reply)),
        )
        return bool(rows)

    async def waiting(self) -> list[Waiting]:
        """Return who is to be looked at, in the order in which they came.

        What nobody can read, as others wrote it, is removed.
        """
        found, unreadable = [], []
        for row in await self._registry.fetch(_WAITING):
            try:
                question = CapacityWait.model_validate_json(row["question"])
                reply = Reply(**json.loads(row["reply"]))
            except (ValueError, TypeError):
                unreadable.append(row["wait_id"])
                continue
            found.append(Waiting(row["wait_id"], question, reply, row["is_over"], row["kind"]))
        if unreadable:
            log.warning("removed %d from the line whose questions nobody can read", len(unreadable))
            await self.leave(unreadable)
        return found

    async def spoken_for(self) -> set[UUID]:
        """Return the agents that somebody was offered just now."""
        rows = await self._registry.fetch(_SPOKEN_FOR, OFFERED_SECONDS)
        return {row["offered_agent_id"] for row in rows}

    async def find_each(self, questions: Sequence[CapacityQuery], most: int) -> list[Found]:
        """Return for each question who fits, best first, at most so many: one statement."""
        columns = list(zip(*(asked(question, most) for question in questions), strict=True))
        del columns[7]  # how many is the same for all
        rows = await self._registry.fetch(_FIND_EACH, list(range(len(questions))), most, *columns)
        found: list[Found | None] = [None] * len(questions)
        for row in rows:
            one = found[row["number"]]
            if one is None:
                one = found[row["number"]] = Found(row["as_of"], row["degraded"], [], [])
            if row["agent_id"] is not None:
                one.rows.append(row)
        return [one for one in found if one is not None]

    async def take(self, wait_ids: Sequence[UUID]) -> dict[UUID, bool]:
        """Return those that are ours to answer now, and whether that is the last try."""
        rows = await self._registry.fetch(_TAKE, wait_ids, ANSWERING_SECONDS)
        return {row["wait_id"]: row["tries"] >= MOST_TRIES for row in rows}

    async def offered(self, agents: Mapping[UUID, UUID]) -> None:
        """Note who was offered which agent first: they may come back to their places."""
        await self._registry.fetch(_OFFERED, list(agents), list(agents.values()))

    async def leave(self, wait_ids: Sequence[UUID]) -> None:
        """Remove these, and who was offered something a while ago."""
        await self._registry.fetch(_LEAVE, wait_ids, KEPT_SECONDS)
