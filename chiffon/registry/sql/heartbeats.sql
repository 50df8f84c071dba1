-- Heartbeats to rows. Agents are locked in the order of their ids, here and in the sweep, so no two
-- orchestrators wait for each other in a circle.

-- name: record
-- Apply a batch, at most one heartbeat an agent. What is not newer than the row changes nothing.
-- Returns only agents of which there is something to say: changed, stale, or with reservations.
-- Longer than a screen, as it names every column of a heartbeat three times.
WITH batch AS MATERIALIZED (
  SELECT * FROM unnest(
    :agent_ids::uuid[], :agent_types::text[], :pool_names::text[], :capabilities::text[],
    :statuses::text[], :hostnames::text[], :agent_versions::text[], :incarnations::bigint[],
    :sequences::bigint[], :sent_at::timestamptz[], :intervals::float8[], :leases::float8[],
    :held_seconds::float8[], :resources::text[]
  ) AS b (agent_id, agent_type, pool_name, capabilities, status, hostname, agent_version,
          incarnation, sequence, sent_at, interval_seconds, lease_seconds, held_seconds, resources)
), applied AS (
  INSERT INTO agent_registry AS r (
    agent_id, agent_type, pool_name, capabilities, status, hostname, agent_version, incarnation,
    sequence, sent_at, interval_seconds, lease_seconds, last_heartbeat_at, resource_metrics,
    status_reason, status_changed_at)
  SELECT agent_id, agent_type, pool_name, capabilities::jsonb, status, hostname, agent_version,
         incarnation, sequence, sent_at, interval_seconds, lease_seconds,
         -- now(), not statement_timestamp(): the former is taken at Bind, the latter again at
         -- Execute, after Bind has waited for whoever locks the table.
         now() - held_seconds * interval '1 second', coalesce(resources::jsonb, '{}'),
         CASE status WHEN 'offline' THEN 'farewell' END, now()
    FROM batch
   -- What outlived its lease in our memory says nothing about the present; a farewell always does.
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
      THEN r.resource_metrics ELSE excluded.resource_metrics END,
    available_vram_gb = NULL, available_single_gpu_vram_gb = NULL,
    available_cores = NULL, available_memory_gb = NULL,
    status_reason = excluded.status_reason,
    status_changed_at = CASE WHEN r.status = excluded.status
      THEN r.status_changed_at ELSE excluded.status_changed_at END
  WHERE (r.incarnation, r.sequence) < (excluded.incarnation, excluded.sequence)
  -- Of the row as it was locked, so that each change is returned by exactly one statement.
  RETURNING agent_id, status_changed_at = now() AS is_changed, reserved,
            CASE WHEN reserved IS NOT NULL THEN resource_metrics END AS resource_metrics
)
SELECT b.agent_id, coalesce(a.is_changed, false) AS is_changed, a.agent_id IS NULL AS is_stale,
       b.incarnation, b.sequence, a.reserved, a.resource_metrics,
       -- Not a join: that would look up every row, where a few are returned.
       (SELECT r.incarnation FROM agent_registry r WHERE r.agent_id = b.agent_id)
         AS kept_incarnation
  FROM batch b LEFT JOIN applied a USING (agent_id)
 WHERE a.is_changed IS NOT FALSE OR a.reserved IS NOT NULL

-- name: write_available
-- Write what reservations leave of agents, unless a row has changed since that was computed:
-- whoever changed it computes it anew.
UPDATE agent_registry r
   SET available_vram_gb = c.vram_gb, available_single_gpu_vram_gb = c.single_gpu_vram_gb,
       available_cores = c.cores, available_memory_gb = c.memory_gb
  FROM (
    SELECT c.* FROM unnest(
      :agent_ids::uuid[], :reserved::text[], :resource_metrics::text[], :vram_gb::float8[],
      :single_gpu_vram_gb::float8[], :cores::float8[], :memory_gb::float8[]
    ) AS c (agent_id, reserved, resource_metrics, vram_gb, single_gpu_vram_gb, cores, memory_gb)
      JOIN agent_registry r USING (agent_id)
     WHERE r.reserved = c.reserved::jsonb AND r.resource_metrics = c.resource_metrics::jsonb
     ORDER BY r.agent_id FOR NO KEY UPDATE OF r
  ) c
 WHERE r.agent_id = c.agent_id

-- name: count_lower_incarnations
-- Note with each of these agents that a heartbeat of an earlier start came once more.
UPDATE agent_registry r
   SET lower_incarnations = r.lower_incarnations + 1, lower_incarnation_at = now()
 WHERE agent_id IN (
   SELECT agent_id FROM agent_registry WHERE agent_id = ANY(:agent_ids::uuid[])
    ORDER BY agent_id FOR UPDATE)
