-- Candidates for offers and reservations. `capacity.room` judges them; what is left out here by an
-- index is only what it would refuse.

-- fragment: fresh
(r.last_heartbeat_at > statement_timestamp() - r.lease_seconds * interval '1 second'
 AND r.last_heartbeat_at < statement_timestamp() + :future_seconds * interval '1 second')

-- fragment: degraded
-- Whether we do not trust our own view now.
coalesce((SELECT NOT is_fresh OR grace_until > statement_timestamp() FROM path_state), true)

-- fragment: degraded_in_pool
({degraded} OR EXISTS (SELECT FROM pool_outage o WHERE o.ended_at IS NULL
  AND (:pool_name::text IS NULL OR o.pool_name = :pool_name)))

-- fragment: candidate
-- What an agent is judged by, in the order of `rows.Candidate`.
r.agent_id, r.hostname, r.pool_name, r.agent_type, r.capabilities, r.status, r.drained,
r.metrics_sound, {fresh} AS is_fresh,
r.last_heartbeat_at IS NOT DISTINCT FROM r.hidden_heartbeat_at AS is_hidden,
r.free_vram_gb, r.free_single_gpu_vram_gb, r.free_cores, r.free_memory_gb,
r.performance_score, r.last_heartbeat_at,
extract(epoch FROM statement_timestamp() - r.last_heartbeat_at)::float8 AS age_seconds

-- fragment: best_first
coalesce(r.available_vram_gb, r.free_vram_gb) DESC, coalesce(r.available_cores, r.free_cores) DESC,
r.performance_score DESC, r.agent_id

-- fragment: may_fit
r.status = 'online' AND r.metrics_sound AND NOT r.drained
AND r.last_heartbeat_at IS DISTINCT FROM r.hidden_heartbeat_at AND {fresh}
AND coalesce(r.available_vram_gb, r.free_vram_gb) >= :min_gpu_vram_gb::float8
AND coalesce(r.available_single_gpu_vram_gb, r.free_single_gpu_vram_gb)
    >= :min_single_gpu_vram_gb::float8
AND coalesce(r.available_cores, r.free_cores) >= :min_cpu_cores::float8
AND coalesce(r.available_memory_gb, r.free_memory_gb) >= :min_memory_gb::float8
AND (:agent_type::text IS NULL OR r.agent_type = :agent_type)
AND (:gpu_type::text IS NULL OR r.resource_metrics ->> 'gpu_type' = :gpu_type)
AND r.capabilities @> :capabilities::jsonb

-- fragment: found
-- The header stands in the first row alone: to decode it from each costs a tenth of a question.
SELECT CASE WHEN rank IS NOT DISTINCT FROM :skipped::bigint + 1 OR rank IS NULL
         THEN statement_timestamp() END AS as_of,
       CASE WHEN rank IS NOT DISTINCT FROM :skipped::bigint + 1 OR rank IS NULL
         THEN {degraded_in_pool} END AS degraded,
       CASE WHEN rank IS NOT DISTINCT FROM :skipped::bigint + 1 OR rank IS NULL
         THEN ARRAY(SELECT agent_id FROM agent_registry
                     WHERE NOT metrics_sound AND status = 'online' LIMIT 10) END AS malformed,
       offers.*
  FROM (SELECT) one LEFT JOIN offers ON true
 ORDER BY rank

-- name: find
-- Best first, in the order of an index, until there are enough. No lock.
WITH offers AS (
  SELECT {candidate}, r.resource_metrics, r.reserved,
         row_number() OVER (ORDER BY {best_first}) AS rank
    FROM agent_registry r WHERE {may_fit} AND :pool_name::text IS NULL
   ORDER BY {best_first} OFFSET :skipped::bigint LIMIT :most::bigint
)
{found}

-- name: find_in_pool
-- The same of one pool, by an index of its own: it may be few among very many.
WITH offers AS (
  SELECT {candidate}, r.resource_metrics, r.reserved,
         row_number() OVER (ORDER BY {best_first}) AS rank
    FROM agent_registry r WHERE {may_fit} AND r.pool_name = :pool_name::text
   ORDER BY {best_first} OFFSET :skipped::bigint LIMIT :most::bigint
)
{found}

-- name: candidate
-- One agent, whatever it is. No lock.
SELECT {candidate}, r.resource_metrics, r.reserved
  FROM agent_registry r WHERE r.agent_id = :agent_id::uuid

-- name: examine
-- Every agent, in no order. No lock. Without metrics where nothing that is judged needs them: of a
-- large fleet they are most of what is read.
SELECT {candidate},
       CASE WHEN r.reserved IS NOT NULL OR :with_metrics::bool THEN r.resource_metrics END
         AS resource_metrics,
       r.reserved, r.resource_metrics ->> 'gpu_type' AS gpu_type,
       jsonb_typeof(r.resource_metrics -> 'gpu_vram_available_gb') = 'number' AS knows_vram_gb,
       jsonb_typeof(r.resource_metrics -> 'gpu_vram_max_available_gb') = 'number'
         OR jsonb_typeof(r.resource_metrics -> 'gpu_vram_available_gb') = 'number'
         AS knows_single_gpu_vram_gb,
       jsonb_typeof(r.resource_metrics -> 'cpu_cores_available') = 'number' AS knows_cores,
       jsonb_typeof(r.resource_metrics -> 'memory_available_gb') = 'number' AS knows_memory_gb,
       statement_timestamp() AS as_of
  FROM agent_registry r
