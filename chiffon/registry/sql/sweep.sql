-- The sweep: who is silent, and what follows. `orchestrator.silence` judges; these count, and write
-- what was judged. All but `mark_offline` and `hide_*` lock no agent; those lock in the order of
-- ids, skip what is locked, and look at each row again under its lock.

-- fragment: silence_seconds
-- Since the agent was last heard, or excused: by an absence of the path, or an outage of its pool.
-- A heartbeat from the future is none.
extract(epoch FROM statement_timestamp() - greatest(p.fresh_since, o.ended_at, CASE
  WHEN r.last_heartbeat_at <= statement_timestamp() + :future_seconds * interval '1 second'
  THEN r.last_heartbeat_at END))

-- name: silence_candidates
-- Agents whose lease is over by the index of leases, or whose heartbeat is from the future, counted
-- by pool, with the first of those that are due. Reads what is silent, not what is there: the planner
-- knows nothing of leases that move on all the time, so the sweep turns sequential scans off.
-- Nothing is returned while the path is not fresh.
WITH candidate AS MATERIALIZED (
  SELECT agent_id, pool_name, lease_seconds, last_heartbeat_at FROM agent_registry
   WHERE status IN ('online', 'busy')
     AND ((last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second'
            < statement_timestamp() AT TIME ZONE 'UTC'
          OR (last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second'
            > (statement_timestamp()
               + (:longest_lease_seconds + :future_seconds) * interval '1 second')
              AT TIME ZONE 'UTC'
          OR (last_heartbeat_at AT TIME ZONE 'UTC') + lease_seconds * interval '1 second' IS NULL)
   UNION
  -- From the future by less than a lease: there are such only after the clock was set back.
  SELECT agent_id, pool_name, lease_seconds, last_heartbeat_at FROM agent_registry
   WHERE status IN ('online', 'busy')
     AND last_heartbeat_at > statement_timestamp() + :future_seconds * interval '1 second'
     AND EXISTS (SELECT FROM ingest_path WHERE clock_set_back_at > statement_timestamp()
                   - (:longest_lease_seconds + :future_seconds) * interval '1 second')
), alive AS (
  SELECT r.agent_id, r.pool_name, r.lease_seconds, {silence_seconds} AS silence,
         coalesce(r.last_heartbeat_at < p.fresh_since, true) AS is_unheard
    FROM candidate r JOIN path_state p ON p.is_fresh LEFT JOIN pool_outage o USING (pool_name)
)
SELECT pool_name, count(*) FILTER (WHERE silence > lease_seconds) AS silent,
       coalesce((array_agg(agent_id ORDER BY agent_id) FILTER (
         WHERE silence > lease_seconds * :offline_after_leases))[1:10000], '{}') AS due,
       count(*) FILTER (WHERE silence > lease_seconds AND is_unheard) AS unheard
  FROM alive GROUP BY pool_name

-- name: marked_lately
-- How many of these pools were marked offline for silence within their own lease, since the last
-- outage: they became silent together with those who are silent now.
SELECT r.pool_name, count(*) AS marked
  FROM agent_registry r LEFT JOIN pool_outage o USING (pool_name)
 WHERE r.pool_name = ANY(:pool_names::text[])
   AND r.status = 'offline' AND r.status_reason <> 'farewell'
   AND r.status_changed_at > statement_timestamp()
     - (:longest_lease_seconds + :future_seconds) * interval '1 second'
   AND r.status_changed_at > statement_timestamp() - r.lease_seconds * interval '1 second'
   AND r.status_changed_at > coalesce(o.ended_at, '-infinity')
 GROUP BY r.pool_name

-- name: pool_sizes
-- How many agents of these pools are online or busy.
SELECT pool_name, count(*) AS members FROM agent_registry
 WHERE pool_name = ANY(:pool_names::text[]) AND status IN ('online', 'busy') GROUP BY pool_name

-- name: open_outages
-- Pools in an outage: for how long, when one of them was last marked, and how many of how many are
-- silent, whatever excuses them.
SELECT o.pool_name,
       extract(epoch FROM statement_timestamp() - o.began_at)::float8 AS seconds,
       extract(epoch FROM statement_timestamp() - max(r.status_changed_at) FILTER (
         WHERE r.status = 'offline' AND r.status_reason <> 'farewell'
           AND r.status_changed_at > o.began_at))::float8 AS last_marked_seconds_ago,
       count(*) FILTER (WHERE r.status IN ('online', 'busy')) AS members,
       count(*) FILTER (WHERE r.status IN ('online', 'busy')
         AND coalesce(r.last_heartbeat_at, '-infinity')
             < statement_timestamp() - r.lease_seconds * interval '1 second') AS silent
  FROM pool_outage o LEFT JOIN agent_registry r USING (pool_name)
 WHERE o.ended_at IS NULL AND EXISTS (SELECT FROM path_state WHERE is_fresh)
 GROUP BY o.pool_name, o.began_at

-- name: begin_outages
-- Note that an outage of these pools begins; returns those that were not in one already.
INSERT INTO pool_outage AS o (pool_name, began_at)
SELECT pool_name, statement_timestamp() FROM unnest(:pool_names::text[]) AS p (pool_name)
 ORDER BY pool_name
ON CONFLICT (pool_name) DO UPDATE SET began_at = excluded.began_at, ended_at = NULL
 WHERE o.ended_at IS NOT NULL
RETURNING pool_name

-- name: end_outages
-- Let everybody in these pools have a lease of grace; returns those that were still in an outage.
UPDATE pool_outage SET ended_at = statement_timestamp()
 WHERE pool_name = ANY(:pool_names::text[]) AND ended_at IS NULL
RETURNING pool_name

-- name: mark_offline
-- Mark those of these agents offline that are still silent when they are locked: a heartbeat that
-- came meanwhile wins, so does an outage that ended, and each agent is returned to one orchestrator.
UPDATE agent_registry r
   SET status = 'offline', status_changed_at = statement_timestamp(),
       status_reason = CASE WHEN r.last_heartbeat_at IS NULL THEN 'never heard of'
         ELSE format('missed %s heartbeats', floor(extract(epoch FROM
           statement_timestamp() - r.last_heartbeat_at) / r.interval_seconds)) END
 WHERE r.agent_id IN (
   SELECT r.agent_id FROM agent_registry r JOIN path_state p ON p.is_fresh
     LEFT JOIN pool_outage o USING (pool_name)
    WHERE r.agent_id = ANY(:agent_ids::uuid[]) AND r.status IN ('online', 'busy')
      AND {silence_seconds} > r.lease_seconds * :offline_after_leases
    ORDER BY r.agent_id FOR UPDATE OF r SKIP LOCKED)
RETURNING r.agent_id, r.hostname, r.pool_name, r.status_reason

-- name: hide_silent
-- Hide the silent of pools in an outage from offers: they stay online, and each question would step
-- over all that are better than those who speak. Some at a time: each is a new version of a row.
UPDATE agent_registry r SET hidden_heartbeat_at = r.last_heartbeat_at
 WHERE r.agent_id IN (
   SELECT r.agent_id FROM agent_registry r JOIN pool_outage o USING (pool_name)
    WHERE o.ended_at IS NULL AND r.status = 'online' AND r.metrics_sound
      AND EXISTS (SELECT FROM pool_outage WHERE ended_at IS NULL)
      AND r.last_heartbeat_at IS DISTINCT FROM r.hidden_heartbeat_at
      AND NOT (r.last_heartbeat_at > statement_timestamp() - r.lease_seconds * interval '1 second'
               AND r.last_heartbeat_at
                   < statement_timestamp() + :future_seconds * interval '1 second')
    ORDER BY r.agent_id LIMIT :most::int FOR UPDATE OF r SKIP LOCKED)

-- name: hide_disconnected
-- Hide agents whose connection closed so many seconds ago, unless they have spoken since.
UPDATE agent_registry r SET hidden_heartbeat_at = r.last_heartbeat_at
 WHERE r.agent_id IN (
   SELECT r.agent_id FROM agent_registry r
     JOIN unnest(:agent_ids::uuid[], :seconds_ago::float8[]) AS c (agent_id, seconds_ago)
       USING (agent_id)
    WHERE r.status IN ('online', 'busy')
      AND r.last_heartbeat_at < statement_timestamp() - c.seconds_ago * interval '1 second'
      AND r.last_heartbeat_at IS DISTINCT FROM r.hidden_heartbeat_at
    ORDER BY r.agent_id FOR UPDATE OF r SKIP LOCKED)
RETURNING r.agent_id, r.hostname
