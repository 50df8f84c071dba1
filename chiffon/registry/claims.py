"""The SQL of reservations.

All that admits a reservation stands in the agent's own row: status, drain, lease, what the agent
reported and what is held on it. A claim is one statement: it picks agents that are free and that
nobody holds a lock on, updates their rows on the whole condition, and writes the reservation down.
PostgreSQL looks at a row's newest version before it updates it, so nothing that the condition reads
can be out of date; what lies outside that row could be. ``tests/integration/test_races.py`` keeps
the natural statements, which are wrong, and shows that it would notice.

Locks: a claim never waits for an agent's row. What ends a reservation locks the reservation first,
then the agents' rows in the order of their ids, as ingest and sweep do.
"""

from chiffon.registry.offers import ANY_POOL, BEST_FIRST, OF_POOL, TAKE, within


def _fits(of_pool: str | None = None) -> str:
    return f"{within(of_pool)} AND {TAKE} IS NOT NULL"


_FITS = _fits()
_HOST = "coalesce(r.hostname, r.agent_id::text)"

RESERVATION = """reservation_id, holder, idempotency_key, request_hash, state, reason, fence,
       lease_seconds, created_at, expires_at, ended_at, asked, gpu_vram_gb, cpu_cores, memory_gb,
       places, alternative, statement_timestamp() AS as_of"""


def _claim(among: str, fits: str = _FITS) -> str:
    """Return the statement of a claim.

    Args:
        among: The SQL of who is picked from, besides being free.
        fits: The SQL of being free.
    """
    return f"""
WITH known AS (
  SELECT FROM reservation WHERE holder = $16 AND idempotency_key = $17
), picked AS MATERIALIZED (
  SELECT r.agent_id FROM agent_registry r
   WHERE NOT EXISTS (SELECT FROM known) AND {among} AND {fits}
   ORDER BY {BEST_FIRST} LIMIT $8 FOR NO KEY UPDATE OF r SKIP LOCKED
), ticket AS MATERIALIZED (
  -- Drawn while the rows are locked, so that on each agent fences grow in the order of commits.
  SELECT nextval('reservation_fence') AS fence WHERE (SELECT count(*) FROM picked) = $8::int
), claimed AS (
  UPDATE agent_registry r
     SET held = CASE jsonb_typeof(r.held) WHEN 'object' THEN r.held ELSE '{{}}' END
         || jsonb_build_object(
           $15::uuid::text, {TAKE} || jsonb_build_object('fence', ticket.fence))
    FROM picked, ticket WHERE r.agent_id = picked.agent_id AND {fits}
  RETURNING r.agent_id, ticket.fence, jsonb_build_object(
    'agent_id', r.agent_id, 'hostname', r.hostname, 'pool_name', r.pool_name,
    'gpus', r.held #> ARRAY[$15::uuid::text, 'chosen']) AS place
), made AS (
  INSERT INTO reservation (
    reservation_id, holder, idempotency_key, request_hash, fence, lease_seconds, created_at,
    expires_at, gpu_vram_gb, cpu_cores, memory_gb, agent_ids, places, alternative)
  SELECT $15::uuid, $16::text, $17::uuid, $18::bytea,
         -- All or none: without a fence the statement fails, and all of it is undone.
         CASE WHEN count(*) = $8::int THEN max(fence) END,
         $19::float8, statement_timestamp(),
         statement_timestamp() + $19::float8 * interval '1 second', $12::float8, $13::float8::int,
         $14::float8, array_agg(agent_id ORDER BY agent_id),
         jsonb_agg(place ORDER BY agent_id), $20::int
    FROM claimed HAVING count(*) > 0
  RETURNING {RESERVATION}
)
SELECT made.*, EXISTS (SELECT FROM known) AS is_known
  FROM (SELECT) one LEFT JOIN made ON true
"""  # noqa: S608


_ANY, _ON = "$10::uuid IS NULL", "r.agent_id = $10::uuid"

CLAIM = _claim(_ANY)
# Planned once, as FIND_IN_ORDER and FIND_IN_POOL are: planning took as long as running it.
CLAIM_IN_ORDER, CLAIM_IN_POOL = _claim(_ANY, _fits(ANY_POOL)), _claim(_ANY, _fits(OF_POOL))
CLAIM_ON = _claim(_ON)
CLAIM_ON_DISTINCT_HOSTS = _claim(
    f"""{_ANY} AND r.agent_id IN (
     SELECT agent_id FROM (
       SELECT r.agent_id, row_number() OVER (PARTITION BY {_HOST} ORDER BY {BEST_FIRST}) AS place
         FROM agent_registry r WHERE {_FITS}) ranked WHERE place = 1)"""  # noqa: S608
)

# Of a claim that got nothing: whether as many fit as it wanted, and others were at them. Apart, as
# in the order of an index, which a claim is planned for, counting may be the long way.
FITTING = f"""
SELECT count(*) >= $8::int AS is_enough FROM (
  SELECT FROM agent_registry r
   WHERE ($10::uuid IS NULL OR {_ON}) AND {_FITS} LIMIT $8) fitting
"""  # noqa: S608
FITTING_ON_DISTINCT_HOSTS = f"""
SELECT count(DISTINCT {_HOST}) >= $8::int AS is_enough FROM agent_registry r
 WHERE {_ANY} AND {_FITS}
"""  # noqa: S608

ASK_AGAIN = f"""
UPDATE reservation SET asked = asked + (request_hash = $3)::int
 WHERE holder = $1 AND idempotency_key = $2
RETURNING {RESERVATION}
"""  # noqa: S608

RENEW = f"""
UPDATE reservation v
   SET lease_seconds = coalesce($2::float8, lease_seconds),
       expires_at = statement_timestamp()
                    + coalesce($2::float8, lease_seconds) * interval '1 second'
 WHERE reservation_id = $1 AND state = 'held' AND fence = coalesce($3::bigint, fence)
   -- Of an agent that was forgotten the room is gone.
   AND (SELECT count(*) FROM agent_registry r
         WHERE r.agent_id = ANY(v.agent_ids) AND r.held ? v.reservation_id::text)
       = cardinality(v.agent_ids)
RETURNING {RESERVATION}
"""  # noqa: S608


def _end(due: str) -> str:
    """Return the statement that ends reservations, and frees their room.

    Args:
        due: SQL that locks those in question and returns ``reservation_id, became, because``.
    """
    return f"""
WITH due AS MATERIALIZED ({due}), ended AS (
  UPDATE reservation v
     SET state = due.became, reason = due.because, ended_at = statement_timestamp(),
         idempotency_key = CASE WHEN due.because = 'undelivered' THEN NULL
                                ELSE v.idempotency_key END
    FROM due WHERE v.reservation_id = due.reservation_id AND v.state = 'held'
  RETURNING v.agent_ids, {RESERVATION.replace("reservation_id", "v.reservation_id", 1)}
), theirs AS MATERIALIZED (
  SELECT r.agent_id FROM agent_registry r
   WHERE r.agent_id IN (SELECT unnest(agent_ids) FROM ended)
   ORDER BY r.agent_id FOR NO KEY UPDATE
), freed AS (
  UPDATE agent_registry r
     SET held = nullif(r.held - ARRAY(SELECT reservation_id::text FROM ended), '{{}}')
    FROM theirs WHERE r.agent_id = theirs.agent_id
)
SELECT * FROM ended
"""  # noqa: S608


# The ids of what is held on an agent ``r``, whatever else somebody wrote there.
_KEYS = """
  SELECT key FROM jsonb_object_keys(
    CASE jsonb_typeof(r.held) WHEN 'object' THEN r.held ELSE '{}' END) key
   WHERE key ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'"""

# Each looks at the row as it is once it is locked: who renewed meanwhile is not ended.
RELEASE = _end("""
  SELECT reservation_id, 'released' AS became, 'released' AS because FROM reservation
   WHERE reservation_id = $1 AND state = 'held' AND fence = coalesce($2::bigint, fence)
   FOR UPDATE""")
RELEASE_UNDELIVERED = _end("""
  SELECT reservation_id, 'released' AS became, 'undelivered' AS because FROM reservation
   WHERE reservation_id = $1 AND state = 'held' AND asked = 1
     -- Who has renewed it has it.
     AND expires_at = created_at + lease_seconds * interval '1 second'
   FOR UPDATE""")
# After an absence of the path, in which nobody could renew, everybody has time to do so.
EXPIRE = _end("""
  SELECT reservation_id, 'expired' AS became, 'not renewed' AS because FROM reservation
   WHERE state = 'held' AND expires_at <= statement_timestamp()
     AND EXISTS (
       SELECT FROM ingest_path p
        WHERE p.fresh_at BETWEEN statement_timestamp() - interval '5 seconds'
                             AND statement_timestamp() + interval '1 second'
          AND p.fresh_since + least(lease_seconds, 10) * interval '1 second'
              <= statement_timestamp())
   ORDER BY expires_at LIMIT 500 FOR UPDATE SKIP LOCKED""")
# An agent that was offline when the path broke has had no time to come back either.
REVOKE = _end(f"""
  SELECT v.reservation_id, 'revoked' AS became, ill.because
    FROM (
      SELECT DISTINCT ON (id) key::uuid AS id,
             CASE WHEN r.drained AND r.drain_deadline <= statement_timestamp()
                  THEN 'agent drained' ELSE 'agent offline' END AS because
        FROM agent_registry r CROSS JOIN LATERAL ({_KEYS}) k (key)
        LEFT JOIN ingest_path p
          ON p.fresh_at BETWEEN statement_timestamp() - interval '5 seconds'
                            AND statement_timestamp() + interval '1 second'
       WHERE r.held IS NOT NULL
         AND (r.drained AND r.drain_deadline <= statement_timestamp()
              OR r.status = 'offline'
                 AND greatest(r.status_changed_at, p.fresh_since)
                     <= statement_timestamp() - $1 * interval '1 second'
                 AND p.fresh_since IS NOT NULL)
       ORDER BY id
    ) ill JOIN reservation v ON v.reservation_id = ill.id
   WHERE v.state = 'held' ORDER BY v.reservation_id LIMIT 500 FOR UPDATE OF v SKIP LOCKED""")  # noqa: S608
REVOKE_ON = _end(f"""
  SELECT reservation_id, 'revoked' AS became, 'agent forgotten' AS because FROM reservation
   WHERE state = 'held' AND reservation_id IN (
     SELECT key::uuid FROM agent_registry r CROSS JOIN LATERAL ({_KEYS}) k (key)
      WHERE r.agent_id = ANY($1::uuid[]))
   ORDER BY reservation_id FOR UPDATE""")  # noqa: S608

SHOW = f"SELECT {RESERVATION} FROM reservation WHERE reservation_id = $1"  # noqa: S608
LIST = f"""
SELECT v.*, statement_timestamp() AS listed_at
  FROM (SELECT) one LEFT JOIN (
   SELECT {RESERVATION} FROM reservation
    WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR holder = $2)
      AND ($3::uuid IS NULL OR $3 = ANY(agent_ids))
    ORDER BY fence DESC LIMIT $4
  ) v ON true
 ORDER BY fence DESC
"""  # noqa: S608

PURGE = """
DELETE FROM reservation WHERE reservation_id IN (
  SELECT reservation_id FROM reservation
   WHERE state <> 'held' AND ended_at < statement_timestamp() - $1 * interval '1 second'
   LIMIT 1000 FOR UPDATE SKIP LOCKED)
RETURNING reservation_id
"""
