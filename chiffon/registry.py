"""The fleet as PostgreSQL has it. All SQL is here, and every time in it is the database's.

Each method is one round trip. Statements that update several agents lock them in the order of
``agent_id``, so any number of orchestrators may run them at once without a deadlock.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from chiffon import liveness
from chiffon.errors import (
    BadConfiguration,
    RegistryRefused,
    RegistryUnavailable,
    RowRefused,
    TablesMissing,
)
from chiffon.messages import CapacityQuery, StatusUpdate

ANSWER_SECONDS = 5.0

# The arithmetic of liveness.py, in SQL: a lease, four thirds of it before an agent is marked
# offline, and 5 s for which a canary proves the path. The tests compare the two.

RECORD = """
WITH batch AS MATERIALIZED (
  SELECT * FROM unnest(
    $1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
    $8::bigint[], $9::bigint[], $10::timestamptz[], $11::float8[], $12::float8[], $13::float8[],
    $14::text[]
  ) AS b (agent_id, agent_type, pool_name, capabilities, status, hostname, agent_version,
          incarnation, sequence, sent_at, interval_seconds, lease_seconds, held_seconds, resources)
), applied AS (
  INSERT INTO agent_registry AS r (
    agent_id, agent_type, pool_name, capabilities, status, hostname, agent_version, incarnation,
    sequence, sent_at, interval_seconds, lease_seconds, last_heartbeat_at, resource_metrics)
  SELECT agent_id, agent_type, pool_name, capabilities::jsonb, status, hostname, agent_version,
         incarnation, sequence, sent_at, interval_seconds, lease_seconds,
         -- now(), not statement_timestamp(): each is taken when the server gets a message of the
         -- protocol, the former at Bind and the latter again at Execute, after Bind has waited
         -- for whoever locks the table. Alone in its transaction, a statement has both.
         now() - held_seconds * interval '1 second',
         coalesce(resources::jsonb, '{}')
    FROM batch
   -- What outlived its lease in our hands tells nothing of the present; a farewell always does.
   WHERE status = 'offline' OR held_seconds < lease_seconds
   ORDER BY agent_id
  ON CONFLICT (agent_id) DO UPDATE SET
    agent_type = excluded.agent_type, pool_name = excluded.pool_name,
    capabilities = excluded.capabilities, status = excluded.status,
    hostname = excluded.hostname, agent_version = excluded.agent_version,
    incarnation = excluded.incarnation, sequence = excluded.sequence,
    sent_at = excluded.sent_at, interval_seconds = excluded.interval_seconds,
    lease_seconds = excluded.lease_seconds, last_heartbeat_at = excluded.last_heartbeat_at,
    resource_metrics = CASE
      WHEN excluded.status = 'offline' AND excluded.resource_metrics = '{}'
      THEN r.resource_metrics ELSE excluded.resource_metrics END
  WHERE (r.incarnation, r.sequence) < (excluded.incarnation, excluded.sequence)
  RETURNING agent_id
)
SELECT b.agent_id, b.incarnation, r.incarnation AS kept_incarnation
  FROM batch b LEFT JOIN agent_registry r USING (agent_id)
 WHERE b.agent_id NOT IN (SELECT agent_id FROM applied)
"""

MARK_PATH_FRESH = """
INSERT INTO ingest_path AS p (fresh_at, fresh_since, grace_until)
SELECT now() - $1 * interval '1 second', statement_timestamp(),
       statement_timestamp() + coalesce((
         SELECT max(r.lease_seconds * 4 / 3 * interval '1 second') FROM agent_registry r
          WHERE r.status IN ('online', 'busy') AND NOT EXISTS (SELECT FROM ingest_path)
       ), interval '0')
ON CONFLICT (only_row) DO UPDATE SET
  -- A last canary from the future: the clock was set back, which is a gap like any other.
  fresh_at = CASE WHEN p.fresh_at > statement_timestamp() + interval '1 second'
    THEN excluded.fresh_at ELSE greatest(p.fresh_at, excluded.fresh_at) END,
  fresh_since = CASE WHEN statement_timestamp() - p.fresh_at
      NOT BETWEEN interval '-1 second' AND interval '5 seconds'
    THEN statement_timestamp() ELSE p.fresh_since END,
  grace_until = CASE WHEN statement_timestamp() - p.fresh_at
      NOT BETWEEN interval '-1 second' AND interval '5 seconds'
    THEN statement_timestamp() + coalesce((
      SELECT max(r.lease_seconds * 4 / 3 * interval '1 second') FROM agent_registry r
       WHERE r.status IN ('online', 'busy')
    ), interval '0') ELSE p.grace_until END
"""

SETTLE_GRACE = """
UPDATE ingest_path p SET grace_until = least(p.grace_until, coalesce((
    SELECT max(p.fresh_since + r.lease_seconds * 4 / 3 * interval '1 second') FROM agent_registry r
     WHERE r.status IN ('online', 'busy')
       AND coalesce(r.last_heartbeat_at < p.fresh_since, true)
  ), statement_timestamp()))
 WHERE p.grace_until > statement_timestamp()
"""

MARK_SILENT = """
UPDATE agent_registry SET status = 'offline'
 WHERE agent_id IN (
   SELECT r.agent_id FROM agent_registry r CROSS JOIN ingest_path p
    WHERE r.status IN ('online', 'busy')
      AND p.fresh_at > statement_timestamp() - interval '5 seconds'
      AND statement_timestamp() - greatest(p.fresh_since, CASE
            WHEN r.last_heartbeat_at <= statement_timestamp() + interval '5 seconds'
            THEN r.last_heartbeat_at END)
          > r.lease_seconds * 4 / 3 * interval '1 second'
    ORDER BY r.agent_id FOR UPDATE OF r SKIP LOCKED)
RETURNING agent_id, hostname, pool_name,
  extract(epoch FROM statement_timestamp() - last_heartbeat_at)::float8 AS silence_seconds
"""

FIND = """
WITH header AS (
  SELECT statement_timestamp() AS as_of,
         coalesce((SELECT fresh_at <= statement_timestamp() - interval '5 seconds'
                       OR grace_until > statement_timestamp() FROM ingest_path), true) AS degraded,
         ARRAY(SELECT agent_id FROM agent_registry
                WHERE NOT metrics_sound AND status = 'online' LIMIT 10
              ) AS malformed
), offers AS (
  SELECT r.agent_id, r.agent_type, r.pool_name, r.hostname, r.status, r.resource_metrics,
         r.performance_score, r.last_heartbeat_at, r.free_vram_gb, r.free_cores
    FROM agent_registry r
   WHERE r.status = 'online' AND r.metrics_sound AND NOT r.drained
     AND r.last_heartbeat_at > statement_timestamp() - r.lease_seconds * interval '1 second'
     AND r.last_heartbeat_at < statement_timestamp() + interval '5 seconds'
     AND r.free_vram_gb >= $1 AND r.free_cores >= $2 AND r.free_memory_gb >= $3
     AND r.free_single_gpu_vram_gb >= $9
     AND ($4::text IS NULL OR r.agent_type = $4)
     AND ($5::text IS NULL OR r.pool_name = $5)
     AND ($6::text IS NULL OR r.resource_metrics ->> 'gpu_type' = $6)
     AND r.capabilities @> $7::jsonb
   ORDER BY r.free_vram_gb DESC, r.free_cores DESC, r.performance_score DESC, r.agent_id
   LIMIT $8
)
SELECT header.*, offers.*,
       extract(epoch FROM header.as_of - offers.last_heartbeat_at)::float8 AS age_seconds
  FROM header LEFT JOIN offers ON true
 ORDER BY free_vram_gb DESC, free_cores DESC, performance_score DESC, agent_id
"""

_AGENT = """
SELECT r.agent_id, r.agent_type, r.pool_name, r.capabilities, r.status, r.hostname,
       r.agent_version, r.incarnation, r.sequence, r.sent_at, r.interval_seconds,
       r.lease_seconds, r.drained, r.last_heartbeat_at, r.resource_metrics, r.performance_score,
       extract(epoch FROM statement_timestamp() - r.last_heartbeat_at)::float8 AS age_seconds
  FROM agent_registry r
"""
SHOW = _AGENT + " WHERE r.agent_id = $1"
LIST = (
    _AGENT
    + """
 WHERE ($1::text IS NULL OR r.status = $1) AND ($2::text IS NULL OR r.pool_name = $2)
   AND ($3::text IS NULL OR r.agent_type = $3)
 ORDER BY r.pool_name, r.hostname, r.agent_id
"""
)


@dataclass(frozen=True, slots=True)
class Receipt:
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
class Silenced:
    """An agent that was just marked offline for its silence; ``None``: it never spoke."""

    agent_id: UUID
    hostname: str | None
    pool_name: str
    silence_seconds: float | None


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One agent as the registry has it. Ages are seconds on the database's clock."""

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
    age_seconds: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """The rows that match a capacity query, best first, at most one more than its limit.

    ``malformed`` names up to ten online agents whose metrics nobody can read.
    """

    as_of: datetime
    degraded: bool
    malformed: list[UUID]
    rows: list[asyncpg.Record]


class Registry:
    """The only caller of SQL. Safe to use from many tasks at once.

    Every method raises ``RegistryUnavailable`` when PostgreSQL cannot be reached or does not
    answer within 5 s, and ``RegistryRefused`` when it does not let us in.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool
        self._prepared_on: set[int] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, *, connections: int = 8) -> AsyncIterator["Registry"]:
        """Open the registry; connections are made when they are needed.

        Args:
            url: ``postgresql://user:password@host/database``; ``+asyncpg`` is accepted.
            connections: How many may be open at once.

        Raises:
            BadConfiguration: Not such a URL.
        """
        with answering():
            pool = await asyncpg.create_pool(
                asyncpg_url(url),
                min_size=0,
                max_size=connections,
                timeout=ANSWER_SECONDS,
                command_timeout=ANSWER_SECONDS,
                max_cached_statement_lifetime=0,
                server_settings={"application_name": "chiffon"},
            )
        try:
            yield cls(pool)
        finally:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await pool.close()
            except TimeoutError:
                pool.terminate()

    async def record(self, batch: Sequence[Receipt]) -> list[Stale]:
        """Apply heartbeats: one statement, in effect when this returns.

        Args:
            batch: In the order of ``agent_id``, each agent at most once.

        Returns:
            Those that were not applied: not newer than what the registry holds, or held here
            for longer than their lease. They touched nothing.

        Raises:
            RowRefused: PostgreSQL cannot store one of them; none was applied.
        """
        if not batch:
            return []
        async with self._connection() as connection:
            await self._prepare_on(connection)
            now = time.monotonic()
            columns = zip(*(_columns(receipt, now) for receipt in batch), strict=True)
            rows = await connection.fetch(RECORD, *(list(column) for column in columns))
        return [Stale(*row) for row in rows]

    async def _prepare_on(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        # The server parses a statement at its first use on a connection, and may wait for a lock
        # meanwhile: that has to be over before anybody says how long a message was held.
        backend = connection.get_server_pid()
        if backend not in self._prepared_on:
            await connection.fetch(RECORD, *([] for _ in range(14)))
            self._prepared_on.add(backend)

    async def mark_path_fresh(self, received: float) -> None:
        """Note that a canary went the whole way to the database.

        After a gap of more than 5 s every agent has its own full lease to speak again.

        Args:
            received: When this process received it, seconds of ``time.monotonic``.
        """
        async with self._connection() as connection:
            await connection.fetch(MARK_PATH_FRESH, time.monotonic() - received)

    async def mark_silent(self) -> list[Silenced]:
        """Move every silent agent offline, if the path from the agents to us is proven.

        One statement, so any number of orchestrators may run it at once and each transition is
        returned to exactly one of them. No leader is needed.

        Returns:
            The agents whose status changed; empty almost always.
        """
        await self._fetch(SETTLE_GRACE)
        return [Silenced(*row) for row in await self._fetch(MARK_SILENT)]

    async def find(self, query: CapacityQuery, most: int) -> Found:
        """Return the agents that can take ``query`` now, best first.

        Args:
            query: The needs.
            most: How many rows to return at most.
        """
        rows = await self._fetch(
            FIND,
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
        header = rows[0]
        return Found(
            as_of=header["as_of"],
            degraded=header["degraded"],
            malformed=header["malformed"],
            rows=[row for row in rows if row["agent_id"] is not None],
        )

    async def show(self, agent_id: UUID) -> AgentRow | None:
        """Return one agent, or ``None`` if there is no such agent."""
        rows = await self._fetch(SHOW, agent_id)
        return _agent(rows[0]) if rows else None

    async def list_agents(
        self,
        status: str | None = None,
        pool_name: str | None = None,
        agent_type: str | None = None,
    ) -> list[AgentRow]:
        """Return all agents that fit the filters (``None``: any), by pool, host and id."""
        return [_agent(row) for row in await self._fetch(LIST, status, pool_name, agent_type)]

    async def revision(self) -> str | None:
        """Return the revision of the database's structure, ``None`` where there is none yet."""
        try:
            rows = await self._fetch("SELECT version_num FROM alembic_version")
        except TablesMissing:
            return None
        return rows[0]["version_num"] if rows else None

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator["PoolConnectionProxy[asyncpg.Record]"]:
        with answering():
            async with self._pool.acquire(timeout=ANSWER_SECONDS) as connection:
                yield connection

    async def _fetch(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        async with self._connection() as connection:
            return await connection.fetch(statement, *arguments)


def asyncpg_url(url: str) -> str:
    """Return the URL in the form that asyncpg takes.

    Raises:
        BadConfiguration: It is not a PostgreSQL URL.
    """
    scheme, has_scheme, _ = url.partition("://")
    if not has_scheme or scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise BadConfiguration(
            "CHIFFON_DATABASE_URL: not a PostgreSQL URL; "
            "it looks like postgresql://user:password@host/database"
        )
    try:
        urlsplit(url).port  # noqa: B018  (reading it checks it)
    except ValueError:
        raise BadConfiguration(
            "CHIFFON_DATABASE_URL: a bad port; in a user name or password, "
            "/ is written %2F, @ %40 and : %3A"
        ) from None
    return f"postgresql{url[len(scheme) :]}"


def _columns(receipt: Receipt, now: float) -> tuple[Any, ...]:
    update = receipt.update
    return (
        update.agent_id,
        update.agent_type,
        update.pool_name,
        json.dumps(update.capabilities),
        update.status,
        update.hostname,
        update.agent_version,
        update.incarnation,
        update.sequence,
        update.sent_at,
        update.interval_seconds,
        liveness.lease(update.interval_seconds),
        now - receipt.received,
        update.resources.model_dump_json() if update.resources is not None else None,
    )


def _agent(row: asyncpg.Record) -> AgentRow:
    fields = dict(row)
    fields["capabilities"] = json.loads(fields["capabilities"])
    fields["resource_metrics"] = json.loads(fields["resource_metrics"])
    if fields["age_seconds"] is not None:
        fields["age_seconds"] = max(fields["age_seconds"], 0.0)
    return AgentRow(**fields)


@contextmanager
def answering() -> Iterator[None]:
    """Turn what asyncpg raises inside the block into chiffon's exceptions."""
    try:
        yield
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.InsufficientPrivilegeError,
    ) as error:
        raise RegistryRefused(f"the database refused us: {error}") from None
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError):
        raise TablesMissing(
            "the database has no chiffon tables yet; run `chiffon db upgrade`"
        ) from None
    except asyncpg.exceptions.ClientConfigurationError as error:
        raise BadConfiguration(f"CHIFFON_DATABASE_URL: {error}") from None
    except TimeoutError:
        raise RegistryUnavailable(
            f"the database did not answer within {ANSWER_SECONDS:g} s"
        ) from None
    except (
        asyncpg.DataError,
        asyncpg.IntegrityConstraintViolationError,
        ValueError,  # what the driver itself cannot encode
    ) as error:
        raise RowRefused(str(error).partition("\n")[0]) from None
    except (
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        # The driver's own state, when the server ends a connection as a query begins on it.
        asyncpg.InternalClientError,
    ) as error:
        raise RegistryUnavailable(f"the database failed us: {error}") from error
