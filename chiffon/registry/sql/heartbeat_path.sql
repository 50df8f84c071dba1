-- The path from the agents to the registry, and the canaries that prove it. The view `path_state`
-- says whether it is fresh.

-- name: mark_part_fresh
-- Note that a canary came by one part of the path, this long ago.
INSERT INTO ingest_part AS p (name, fresh_at)
VALUES (:part::text, now() - :seconds_ago::float8 * interval '1 second')
ON CONFLICT (name) DO UPDATE SET
  -- A last canary from the future: the clock was set back.
  fresh_at = CASE WHEN p.fresh_at > statement_timestamp() + interval '1 second'
    THEN excluded.fresh_at ELSE greatest(p.fresh_at, excluded.fresh_at) END

-- name: mark_path_fresh
-- Note that the whole path is proven, if each of its parts is. After a gap everybody who is alive
-- has a lease of grace. A statement of its own, as it has to see what others marked just now.
WITH whole AS (
  SELECT min(fresh_at) AS fresh_at FROM ingest_part
   WHERE name = ANY(:path::text[])
     AND fresh_at BETWEEN statement_timestamp() - :canary_fresh_seconds * interval '1 second'
                      AND statement_timestamp() + interval '1 second'
  HAVING count(*) = cardinality(:path::text[])
), state AS (
  SELECT whole.fresh_at, p.fresh_at AS before_at,
         coalesce(p.fresh_at > statement_timestamp() + interval '1 second', false) AS is_set_back,
         coalesce(statement_timestamp() - p.fresh_at NOT BETWEEN
           interval '-1 second' AND :canary_fresh_seconds * interval '1 second', true) AS is_gap
    FROM whole LEFT JOIN ingest_path p ON true
), after AS (
  SELECT *, CASE WHEN is_set_back OR before_at IS NULL THEN fresh_at
            ELSE greatest(before_at, fresh_at) END AS now_fresh_at,
         CASE WHEN is_gap THEN statement_timestamp() + coalesce((
           SELECT max(lease_seconds) * :offline_after_leases * interval '1 second'
             FROM agent_registry WHERE status IN ('online', 'busy')), interval '0') END AS grace_until
    FROM state
)
INSERT INTO ingest_path AS p (
  queue_delay_seconds, fresh_at, proves_seconds, fresh_since, grace_until, clock_set_back_at)
SELECT :delay_seconds::float8, now_fresh_at,
       :canary_fresh_seconds,
       statement_timestamp(), coalesce(grace_until, statement_timestamp()),
       CASE WHEN is_set_back THEN statement_timestamp() END
  FROM after
ON CONFLICT (only_row) DO UPDATE SET
  queue_delay_seconds = coalesce(excluded.queue_delay_seconds, p.queue_delay_seconds),
  fresh_at = excluded.fresh_at, proves_seconds = excluded.proves_seconds,
  clock_set_back_at = coalesce(excluded.clock_set_back_at, p.clock_set_back_at),
  fresh_since = CASE WHEN (SELECT is_gap FROM state) THEN excluded.fresh_since
                ELSE p.fresh_since END,
  grace_until = CASE WHEN (SELECT is_gap FROM state) THEN excluded.grace_until
                ELSE p.grace_until END

-- name: settle_grace
-- End the grace as soon as everybody who is alive has spoken since the path came back.
UPDATE ingest_path p SET grace_until = least(p.grace_until, coalesce((
    SELECT max(p.fresh_since
               + r.lease_seconds * :offline_after_leases * interval '1 second')
      FROM agent_registry r
     WHERE r.status IN ('online', 'busy')
       AND coalesce(r.last_heartbeat_at < p.fresh_since, true)
  ), statement_timestamp()))
 WHERE p.grace_until > statement_timestamp()

-- name: prove_writable
-- Lock a row for nobody: this needs all that a write needs but the room. A database that takes no
-- writes, or does not let us write, refuses it. A row that is written just now is proof enough.
SELECT FROM ingest_path FOR UPDATE SKIP LOCKED
