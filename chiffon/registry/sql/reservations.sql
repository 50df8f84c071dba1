-- Reservations. Whoever reserves locks agents without waiting for any (SKIP LOCKED), judges them,
-- and writes. Whoever ends reservations locks those first, then the agents in the order of their
-- ids, as ingest and sweep do. So nobody waits in a circle.

-- fragment: reservation
v.reservation_id, v.holder, v.idempotency_key, v.request_hash, v.state, v.reason, v.fence,
v.lease_seconds, v.created_at, v.expires_at, v.ended_at, v.requests, v.gpu_vram_gb, v.cpu_cores,
v.memory_gb, v.places, v.alternative, statement_timestamp() AS as_of

-- fragment: is_new
NOT EXISTS (SELECT FROM reservation WHERE holder = :holder::text
                                      AND idempotency_key = :idempotency_key::uuid)

-- name: lock_candidates
-- The best that may fit and that nobody else is at, locked. None if the key came before.
SELECT {candidate}, r.resource_metrics, r.reserved
  FROM agent_registry r
 WHERE {is_new} AND {may_fit} AND :pool_name::text IS NULL AND r.agent_id <> ALL(:without::uuid[])
 ORDER BY {best_first} LIMIT :most::bigint FOR NO KEY UPDATE OF r SKIP LOCKED

-- name: lock_candidates_in_pool
SELECT {candidate}, r.resource_metrics, r.reserved
  FROM agent_registry r
 WHERE {is_new} AND {may_fit} AND r.pool_name = :pool_name::text
   AND r.agent_id <> ALL(:without::uuid[])
 ORDER BY {best_first} LIMIT :most::bigint FOR NO KEY UPDATE OF r SKIP LOCKED

-- name: lock_candidate
-- One agent, whatever it is; none if somebody is at it, or the key came before.
SELECT {candidate}, r.resource_metrics, r.reserved
  FROM agent_registry r
 WHERE {is_new} AND r.agent_id = :agent_id::uuid FOR NO KEY UPDATE OF r SKIP LOCKED

-- name: write_reservation
-- Write a reservation down, with what it takes of agents that are locked. The fence is drawn under
-- those locks, so that on each agent fences grow in the order of commits. Nothing is returned if
-- another transaction has written this key meanwhile: then all of it has to be rolled back.
WITH ticket AS MATERIALIZED (SELECT nextval('reservation_fence') AS fence),
taken AS (
  UPDATE agent_registry r
     SET reserved = CASE jsonb_typeof(r.reserved) WHEN 'object' THEN r.reserved ELSE '{}' END
           || jsonb_build_object(:reservation_id::uuid::text,
                c.taken::jsonb || jsonb_build_object('fence', ticket.fence)),
         available_vram_gb = c.vram_gb, available_single_gpu_vram_gb = c.single_gpu_vram_gb,
         available_cores = c.cores, available_memory_gb = c.memory_gb
    FROM ticket, unnest(
      :agent_ids::uuid[], :taken::text[], :vram_gb::float8[], :single_gpu_vram_gb::float8[],
      :cores::float8[], :memory_left_gb::float8[]
    ) AS c (agent_id, taken, vram_gb, single_gpu_vram_gb, cores, memory_gb)
   WHERE r.agent_id = c.agent_id
), made AS (
  INSERT INTO reservation (
    reservation_id, holder, idempotency_key, request_hash, fence, lease_seconds, created_at,
    expires_at, gpu_vram_gb, cpu_cores, memory_gb, agent_ids, places, alternative)
  SELECT :reservation_id::uuid, :holder::text, :idempotency_key::uuid, :request_hash::bytea,
         ticket.fence, :lease_seconds::float8, statement_timestamp(),
         statement_timestamp() + :lease_seconds::float8 * interval '1 second',
         :gpu_vram_gb::float8, :cpu_cores::int, :memory_gb::float8, :agent_ids::uuid[],
         :places::jsonb, :alternative::int
    FROM ticket
  ON CONFLICT (holder, idempotency_key) DO NOTHING
  RETURNING *
)
SELECT {reservation} FROM made v

-- name: request_again
-- Return the reservation of a key that came before, and count that it came again.
UPDATE reservation v SET requests = requests + (request_hash = :request_hash::bytea)::int
 WHERE holder = :holder::text AND idempotency_key = :idempotency_key::uuid
RETURNING {reservation}

-- name: renew
-- Begin a lease anew, unless it is over. Of an agent that was forgotten the room is gone.
UPDATE reservation v
   SET lease_seconds = coalesce(:lease_seconds::float8, lease_seconds),
       expires_at = statement_timestamp()
                    + coalesce(:lease_seconds::float8, lease_seconds) * interval '1 second'
 WHERE reservation_id = :reservation_id::uuid AND state = 'held'
   AND fence = coalesce(:fence::bigint, fence)
   AND (SELECT count(*) FROM agent_registry r
         WHERE r.agent_id = ANY(v.agent_ids) AND r.reserved ? v.reservation_id::text)
       = cardinality(v.agent_ids)
RETURNING {reservation}

-- fragment: end_due
-- End the reservations in `due`, which are locked, and free what they took. An agent on which
-- others remain is returned with what is needed to compute what those leave.
ended AS (
  UPDATE reservation v
     SET state = due.state, reason = due.reason, ended_at = statement_timestamp(),
         idempotency_key = CASE WHEN due.reason = 'undelivered' THEN NULL
                                ELSE v.idempotency_key END
    FROM due WHERE v.reservation_id = due.reservation_id AND v.state = 'held'
  RETURNING v.agent_ids, {reservation}
), agents AS MATERIALIZED (
  SELECT r.agent_id FROM agent_registry r
   WHERE r.agent_id IN (SELECT unnest(agent_ids) FROM ended)
   ORDER BY r.agent_id FOR NO KEY UPDATE
), freed AS (
  UPDATE agent_registry r
     SET reserved = nullif(r.reserved - ARRAY(SELECT reservation_id::text FROM ended), '{}'),
         available_vram_gb = NULL, available_single_gpu_vram_gb = NULL,
         available_cores = NULL, available_memory_gb = NULL
    FROM agents WHERE r.agent_id = agents.agent_id
  RETURNING r.agent_id, r.reserved, r.resource_metrics
)
SELECT ended.*, (SELECT json_agg(json_build_object(
         'agent_id', agent_id, 'reserved', reserved, 'resource_metrics', resource_metrics))
         FROM freed WHERE reserved IS NOT NULL) AS remaining
  FROM ended

-- name: release
WITH due AS MATERIALIZED (
  SELECT reservation_id, 'released' AS state, 'released' AS reason FROM reservation
   WHERE reservation_id = :reservation_id::uuid AND state = 'held'
     AND fence = coalesce(:fence::bigint, fence)
   FOR UPDATE
), {end_due}

-- name: release_undelivered
-- One whose answer nobody took, requested once and never renewed: who has renewed it has it.
WITH due AS MATERIALIZED (
  SELECT reservation_id, 'released' AS state, 'undelivered' AS reason FROM reservation
   WHERE reservation_id = :reservation_id::uuid AND state = 'held' AND requests = 1
     AND expires_at = created_at + lease_seconds * interval '1 second'
   FOR UPDATE
), {end_due}

-- name: expire
-- Those that were not renewed in time; after an absence of the path everybody has time to do so.
WITH due AS MATERIALIZED (
  SELECT reservation_id, 'expired' AS state, 'not renewed' AS reason FROM reservation
   WHERE state = 'held' AND expires_at <= statement_timestamp()
     AND EXISTS (
       SELECT FROM path_state p
        WHERE p.is_fresh AND p.fresh_since
          + least(lease_seconds, :time_to_renew_seconds) * interval '1 second'
            <= statement_timestamp())
   ORDER BY expires_at LIMIT 500 FOR UPDATE SKIP LOCKED
), {end_due}

-- fragment: reservation_ids
-- The ids of what is reserved on an agent, whatever else somebody wrote there.
SELECT key FROM jsonb_object_keys(
    CASE jsonb_typeof(r.reserved) WHEN 'object' THEN r.reserved ELSE '{}' END) key
 WHERE key ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$'

-- name: revoke
-- Those on agents that were drained until now, or offline for so long. An agent that was offline
-- when the path broke has had no time to come back either.
WITH lost AS (
  SELECT DISTINCT ON (id) key::uuid AS id,
         CASE WHEN r.drained AND r.drain_deadline <= statement_timestamp()
              THEN 'agent drained' ELSE 'agent offline' END AS reason
    FROM agent_registry r CROSS JOIN LATERAL ({reservation_ids}) k (key)
    LEFT JOIN path_state p ON p.is_fresh
   WHERE r.reserved IS NOT NULL
     AND (r.drained AND r.drain_deadline <= statement_timestamp()
          OR r.status = 'offline' AND p.fresh_since IS NOT NULL
             AND greatest(r.status_changed_at, p.fresh_since)
                 <= statement_timestamp() - :offline_seconds::float8 * interval '1 second')
   ORDER BY id
), due AS MATERIALIZED (
  SELECT v.reservation_id, 'revoked' AS state, lost.reason
    FROM lost JOIN reservation v ON v.reservation_id = lost.id
   WHERE v.state = 'held' ORDER BY v.reservation_id LIMIT 500 FOR UPDATE OF v SKIP LOCKED
), {end_due}

-- name: revoke_on
-- Those on agents that are to be forgotten.
WITH due AS MATERIALIZED (
  SELECT reservation_id, 'revoked' AS state, 'agent forgotten' AS reason FROM reservation
   WHERE state = 'held' AND reservation_id IN (
     SELECT key::uuid FROM agent_registry r CROSS JOIN LATERAL ({reservation_ids}) k (key)
      WHERE r.agent_id = ANY(:agent_ids::uuid[]))
   ORDER BY reservation_id FOR UPDATE
), {end_due}

-- name: show_reservation
SELECT {reservation} FROM reservation v WHERE reservation_id = :reservation_id::uuid

-- name: list_reservations
-- Newest first; one empty row with the time where there are none.
SELECT found.*, statement_timestamp() AS listed_at
  FROM (SELECT) one LEFT JOIN (
   SELECT {reservation} FROM reservation v
    WHERE (:state::text IS NULL OR state = :state) AND (:holder::text IS NULL OR holder = :holder)
      AND (:agent_id::uuid IS NULL OR :agent_id = ANY(agent_ids))
    ORDER BY fence DESC LIMIT :most::bigint
  ) found ON true
 ORDER BY fence DESC

-- name: purge_reservations
-- Some of those that ended longer ago than that.
DELETE FROM reservation WHERE reservation_id IN (
  SELECT reservation_id FROM reservation
   WHERE state <> 'held'
     AND ended_at < statement_timestamp() - :kept_seconds::float8 * interval '1 second'
   LIMIT 1000 FOR UPDATE SKIP LOCKED)
RETURNING reservation_id
