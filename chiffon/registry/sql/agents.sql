-- Agents as they are shown, and what operators do to them.

-- fragment: agent
SELECT r.agent_id, r.agent_type, r.pool_name, r.capabilities, r.status, r.hostname,
       r.agent_version, r.incarnation, r.sequence, r.sent_at, r.interval_seconds,
       r.lease_seconds, r.drained, r.last_heartbeat_at, r.resource_metrics, r.performance_score,
       r.status_reason, r.status_changed_at, r.lower_incarnations, r.lower_incarnation_at,
       extract(epoch FROM statement_timestamp() - r.last_heartbeat_at)::float8 AS age_seconds,
       extract(epoch FROM r.sent_at - r.last_heartbeat_at)::float8 AS clock_skew_seconds,
       (SELECT queue_delay_seconds FROM ingest_path) AS queue_delay_seconds,
       {is_silent} AS is_silent,
       r.drain_reason, r.drained_at, r.drain_deadline, r.reserved
  FROM agent_registry r

-- fragment: is_silent
NOT coalesce({fresh}, false)
  OR r.last_heartbeat_at IS NOT DISTINCT FROM r.hidden_heartbeat_at

-- name: show
{agent} WHERE r.agent_id = :agent_id::uuid

-- name: show_many
{agent} WHERE r.agent_id = ANY(:agent_ids::uuid[])

-- name: list_agents
-- By pool, host and id; after the last one of the page before.
{agent}
 WHERE (:status::text IS NULL OR r.status = :status)
   AND (:pool_name::text IS NULL OR r.pool_name = :pool_name)
   AND (:agent_type::text IS NULL OR r.agent_type = :agent_type)
   AND (:after_pool::text IS NULL OR
        (r.pool_name, coalesce(r.hostname, ''), r.agent_id)
        > (:after_pool, :after_host::text, :after_id::uuid))
 ORDER BY r.pool_name, coalesce(r.hostname, ''), r.agent_id LIMIT :most::bigint

-- name: versions
-- Each change makes a new version of a row, by another transaction.
SELECT agent_id, xmin::text AS version FROM agent_registry

-- name: named
-- Whom somebody means by a host name, an id or the beginning of one; three are enough to say that it
-- is not one.
SELECT agent_id, hostname FROM agent_registry
 WHERE hostname = :text OR agent_id::text LIKE :beginning::text
 ORDER BY agent_id LIMIT 3

-- name: summary
SELECT statement_timestamp() AS as_of,
       {degraded} OR EXISTS (SELECT FROM pool_outage WHERE ended_at IS NULL) AS degraded,
       coalesce((SELECT is_fresh FROM path_state), false) AS is_recording,
       (SELECT extract(epoch FROM statement_timestamp() - fresh_at)::float8 FROM path_state)
         AS recording_age_seconds,
       ARRAY(SELECT pool_name FROM pool_outage WHERE ended_at IS NULL ORDER BY pool_name)
         AS pools_in_outage,
       (SELECT coalesce(json_object_agg(status, agents), '{}') FROM (
         SELECT status, count(*) AS agents FROM agent_registry GROUP BY status) s) AS agents,
       (SELECT count(*) FROM agent_registry r
         WHERE r.status IN ('online', 'busy') AND ({is_silent})) AS silent,
       (SELECT count(*) FROM reservation WHERE state = 'held') AS reservations,
       (SELECT count(*) FROM wait_queue) AS waiting

-- name: forget
-- Locks in the order of ids.
DELETE FROM agent_registry WHERE agent_id IN (
  SELECT agent_id FROM agent_registry WHERE agent_id = ANY(:agent_ids::uuid[])
   ORDER BY agent_id FOR UPDATE)
RETURNING agent_id

-- fragment: long_offline
-- Who has been offline for so long, and nobody counts on: a reservation and a drain keep a row. With
-- `unnamed_only` only those who said farewell, or whom no operator ever named.
r.status = 'offline'
  AND r.status_changed_at < statement_timestamp() - :offline_seconds::float8 * interval '1 second'
  AND NOT r.drained AND coalesce(r.reserved, '{}') = '{}'
  AND (:pool_name::text IS NULL OR r.pool_name = :pool_name)
  AND (NOT :unnamed_only::boolean OR r.status_reason = 'farewell'
       OR (r.named_at IS NULL AND r.performance_score = 0))

-- name: list_long_offline
{agent} WHERE {long_offline} ORDER BY r.pool_name, coalesce(r.hostname, ''), r.agent_id

-- name: forget_long_offline
-- A part of them, those first who have been so for longest. Locks in the order of ids, and passes
-- over whom somebody else is at: a heartbeat of theirs comes first.
WITH due AS (
  SELECT r.agent_id FROM agent_registry r WHERE {long_offline}
   ORDER BY r.status_changed_at LIMIT :most
)
DELETE FROM agent_registry WHERE agent_id IN (
  SELECT r.agent_id FROM agent_registry r JOIN due USING (agent_id) WHERE {long_offline}
   ORDER BY r.agent_id FOR UPDATE OF r SKIP LOCKED)
RETURNING agent_id, hostname

-- name: forget_empty_pools
DELETE FROM pool_outage o
 WHERE NOT EXISTS (SELECT FROM agent_registry r WHERE r.pool_name = o.pool_name)

-- name: drain
UPDATE agent_registry SET drained = true, drain_reason = :reason::text,
       named_at = statement_timestamp(),
       drained_at = CASE WHEN drained THEN drained_at ELSE statement_timestamp() END,
       drain_deadline = statement_timestamp() + :deadline_seconds::float8 * interval '1 second'
 WHERE agent_id = :agent_id::uuid

-- name: undrain
UPDATE agent_registry
   SET drained = false, drain_reason = NULL, drained_at = NULL, drain_deadline = NULL,
       named_at = statement_timestamp()
 WHERE agent_id = :agent_id::uuid

-- name: revision
-- The table has a name of our own: another program in this database may use Alembic too.
SELECT version_num FROM chiffon_version

-- name: missing_tables
SELECT wanted FROM unnest(:names::text[]) AS wanted WHERE to_regclass(quote_ident(wanted)) IS NULL
