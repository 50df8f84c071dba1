"""The SQL of the registry. Times are the database's; agents are locked in the order of ids."""

from chiffon.registry.offers import DEGRADED, FRESH

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
    sequence, sent_at, interval_seconds, lease_seconds, last_heartbeat_at, resource_metrics,
    status_reason, status_changed_at)
  SELECT agent_id, agent_type, pool_name, capabilities::jsonb, status, hostname, agent_version,
         incarnation, sequence, sent_at, interval_seconds, lease_seconds,
         -- now(), not statement_timestamp(): each is taken when the server gets a message of the
         -- protocol, the former at Bind and the latter again at Execute, after Bind has waited
         -- for whoever locks the table. Alone in its transaction, a statement has both.
         now() - held_seconds * interval '1 second',
         coalesce(resources::jsonb, '{}'),
         CASE status WHEN 'offline' THEN 'farewell' END, now()
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
      THEN r.resource_metrics ELSE excluded.resource_metrics END,
    status_reason = excluded.status_reason,
    status_changed_at = CASE WHEN r.status = excluded.status
      THEN r.status_changed_at ELSE excluded.status_changed_at END
  WHERE (r.incarnation, r.sequence) < (excluded.incarnation, excluded.sequence)
  -- Of the row as it was locked, so that each change is told by exactly one statement.
  RETURNING agent_id, status_changed_at = now() AS is_changed
)
SELECT b.agent_id, coalesce(a.is_changed, false) AS is_changed, a.agent_id IS NULL AS is_stale,
       b.incarnation,
       -- Not a join: that would look up every row, where a few are told of.
       (SELECT r.incarnation FROM agent_registry r WHERE r.agent_id = b.agent_id)
         AS kept_incarnation
  FROM batch b LEFT JOIN applied a USING (agent_id)
 WHERE a.is_changed IS NOT FALSE
"""

COUNT_LOWER_INCARNATIONS = """
UPDATE agent_registry r
   SET lower_incarnations = r.lower_incarnations + 1, lower_incarnation_at = now()
 WHERE agent_id IN (
   SELECT agent_id FROM agent_registry WHERE agent_id = ANY($1::uuid[])
    ORDER BY agent_id FOR UPDATE)
"""

FORGET = """
DELETE FROM agent_registry WHERE agent_id IN (
  SELECT agent_id FROM agent_registry WHERE agent_id = ANY($1::uuid[])
   ORDER BY agent_id FOR UPDATE)
RETURNING agent_id
"""

FORGET_EMPTY_POOLS = """
DELETE FROM pool_state s
 WHERE NOT EXISTS (SELECT FROM agent_registry r WHERE r.pool_name = s.pool_name)
"""

DRAIN = """
UPDATE agent_registry SET drained = true, drain_reason = $2,
       drained_at = CASE WHEN drained THEN drained_at ELSE statement_timestamp() END,
       drain_deadline = statement_timestamp() + $3::float8 * interval '1 second'
 WHERE agent_id = $1
"""

UNDRAIN = """
UPDATE agent_registry
   SET drained = false, drain_reason = NULL, drained_at = NULL, drain_deadline = NULL
 WHERE agent_id = $1
"""

MARK_PART_FRESH = """
INSERT INTO ingest_part AS p (name, fresh_at) VALUES ($2, now() - $1 * interval '1 second')
ON CONFLICT (name) DO UPDATE SET
  fresh_at = CASE WHEN p.fresh_at > statement_timestamp() + interval '1 second'
    THEN excluded.fresh_at ELSE greatest(p.fresh_at, excluded.fresh_at) END
"""

# A statement of its own, since it has to see what others marked at the same time.
MARK_PATH_FRESH = """
WITH whole AS (
  SELECT min(fresh_at) AS fresh_at FROM ingest_part
   WHERE name = ANY($2::text[])
     -- What is from the future was proven before the clock was set back.
     AND fresh_at BETWEEN statement_timestamp() - interval '5 seconds'
                      AND statement_timestamp() + interval '1 second'
  HAVING count(*) = cardinality($2::text[])
)
INSERT INTO ingest_path AS p (queue_delay_seconds, fresh_at, fresh_since, grace_until)
SELECT $1::float8, whole.fresh_at, statement_timestamp(),
       statement_timestamp() + coalesce((
         SELECT max(r.lease_seconds * 4 / 3 * interval '1 second') FROM agent_registry r
          WHERE r.status IN ('online', 'busy') AND NOT EXISTS (SELECT FROM ingest_path)
       ), interval '0')
  FROM whole
ON CONFLICT (only_row) DO UPDATE SET
  queue_delay_seconds = coalesce(excluded.queue_delay_seconds, p.queue_delay_seconds),
  -- A last canary from the future: the clock was set back, which is a gap like any other.
  fresh_at = CASE WHEN p.fresh_at > statement_timestamp() + interval '1 second'
    THEN excluded.fresh_at ELSE greatest(p.fresh_at, excluded.fresh_at) END,
  clock_set_back_at = CASE WHEN p.fresh_at > statement_timestamp() + interval '1 second'
    THEN statement_timestamp() ELSE p.clock_set_back_at END,
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

THAW = """
UPDATE pool_state s SET thawed_at = statement_timestamp()
 WHERE s.thawed_at IS NULL
   AND EXISTS (
     SELECT FROM ingest_path
      WHERE fresh_at BETWEEN statement_timestamp() - interval '5 seconds'
                         AND statement_timestamp() + interval '1 second')
   AND s.pool_name NOT IN (
     SELECT r.pool_name FROM agent_registry r
      WHERE r.status IN ('online', 'busy')
        -- Of no pool that is not frozen, so that there is nothing to read if none is.
        AND r.pool_name = ANY(ARRAY(SELECT pool_name FROM pool_state WHERE thawed_at IS NULL))
      GROUP BY r.pool_name
     HAVING avg((coalesce(r.last_heartbeat_at, '-infinity')
                 < statement_timestamp() - r.lease_seconds * interval '1 second')::int)
            >= $1::float8)
RETURNING pool_name
"""

# While a pool's transitions are held its silent agents stay online, and each question would step
# over all that are better than those who speak. Some at a time, as each is a new version of a row.
LAPSE = f"""
UPDATE agent_registry r SET lapsed_heartbeat_at = r.last_heartbeat_at
 WHERE r.agent_id IN (
   SELECT r.agent_id FROM agent_registry r JOIN pool_state s USING (pool_name)
    WHERE s.thawed_at IS NULL AND r.status = 'online' AND r.metrics_sound
      AND EXISTS (SELECT FROM pool_state WHERE thawed_at IS NULL)
      AND r.last_heartbeat_at IS DISTINCT FROM r.lapsed_heartbeat_at AND NOT {FRESH}
    ORDER BY r.agent_id LIMIT $1 FOR UPDATE OF r SKIP LOCKED)
"""  # noqa: S608

# One statement on one snapshot: who is silent, whether that is the outage of a pool, and whom to
# mark. An agent whose connection closed ($4, $5 seconds ago) and which has said nothing since then
# is as silent as one that let its lease pass. It has 1.5 s to open another, and if its connections
# are not known ($6) time for one more heartbeat. When many closed at about that time, those that
# tell of the line alone ($7) included, it was the line that broke: then the lease alone tells. So
# it does while some agent's grace is running: those who all dial at once lose a connection or two.
# After an absence of the path, a pool of which too many ($10) have not been heard since is still
# in the outage: a broker that a whole fleet dials may take longer than a lease to let all in.
#
# It costs what is silent, not what is there: candidates come from an index, those with a heartbeat
# from the future included.
# The fleet is counted (`sizes`, in a CASE) only where enough are silent for an outage.
MARK_SILENT = """
WITH path AS (
  SELECT fresh_since, grace_until FROM ingest_path
   WHERE fresh_at BETWEEN statement_timestamp() - interval '5 seconds'
                      AND statement_timestamp() + interval '1 second' LIMIT 1
), sizes AS MATERIALIZED (
  SELECT pool_name, count(*) AS members, sum(count(*)) OVER () AS everybody
    FROM agent_registry WHERE status IN ('online', 'busy') GROUP BY pool_name
), nearby AS (
  SELECT c.agent_id, c.seconds, c.is_known, c.is_line, r.pool_name,
         count(*) OVER around AS closings,
         count(*) OVER (PARTITION BY r.pool_name ORDER BY c.seconds
                        RANGE BETWEEN $9::float8 PRECEDING AND $9::float8 FOLLOWING)
           AS closings_in_pool
    FROM unnest($4::uuid[], $5::float8[], $6::bool[], $7::bool[])
           AS c (agent_id, seconds, is_known, is_line)
    JOIN agent_registry r USING (agent_id)
  WINDOW around AS (
    ORDER BY c.seconds RANGE BETWEEN $9::float8 PRECEDING AND $9::float8 FOLLOWING)
), closed AS MATERIALIZED (
  SELECT agent_id, seconds, is_known,
         statement_timestamp() - seconds * interval '1 second' AS closed_at,
         CASE WHEN closings > $2::int
           THEN closings > $8::float8 * (SELECT max(everybody) FROM sizes) ELSE false END
         OR CASE WHEN closings_in_pool > $2::int
           THEN closings_in_pool > $8::float8 * (
             SELECT members FROM sizes WHERE sizes.pool_name = nearby.pool_name)
           ELSE false END AS is_burst
    FROM nearby WHERE NOT is_line
), candidates AS MATERIALIZED (
  SELECT agent_id FROM chiffon_silence_candidates() AS c (agent_id)
  UNION
  SELECT agent_id FROM closed
), alive AS MATERIALIZED (
  SELECT r.agent_id, r.pool_name, r.lease_seconds, s.frozen_at, s.thawed_at,
         extract(epoch FROM statement_timestamp() - greatest(path.fresh_since, s.thawed_at, CASE
           WHEN r.last_heartbeat_at <= statement_timestamp() + interval '5 seconds'
           THEN r.last_heartbeat_at END)) AS silence,
         coalesce(r.last_heartbeat_at < path.fresh_since, true) AS is_unheard,
         coalesce(c.closed_at > greatest(path.grace_until, s.thawed_at)
                  AND r.last_heartbeat_at < c.closed_at, false) AS is_closed,
         c.seconds >= greatest(1.5, CASE WHEN NOT c.is_known THEN r.interval_seconds * 1.25 END)
           AS is_settled,
         coalesce(c.is_burst, false) AS is_burst
    FROM candidates JOIN agent_registry r USING (agent_id) CROSS JOIN path
    LEFT JOIN pool_state s USING (pool_name) LEFT JOIN closed c USING (agent_id)
   WHERE r.status IN ('online', 'busy')
), pools AS (
  SELECT pool_name,
         count(*) FILTER (WHERE silence > lease_seconds OR is_closed) AS silent,
         count(*) FILTER (
           WHERE silence > lease_seconds * 4 / 3 OR is_closed AND is_settled) AS due,
         count(*) FILTER (WHERE silence > lease_seconds AND is_unheard) AS unheard,
         coalesce(bool_or(frozen_at IS NOT NULL AND thawed_at IS NULL), false) AS is_frozen,
         max(frozen_at) AS frozen_at, max(thawed_at) AS thawed_at
    FROM alive GROUP BY pool_name
), fallen AS (
  SELECT r.pool_name, count(*) AS marked, max(r.status_changed_at) AS last_marked_at
    FROM agent_registry r JOIN pools p USING (pool_name)
   WHERE p.due > 0 AND r.status = 'offline' AND r.status_reason <> 'farewell'
     AND r.status_changed_at > statement_timestamp() - interval '1805 seconds'
     AND r.status_changed_at > statement_timestamp() - r.lease_seconds * interval '1 second'
     AND r.status_changed_at > coalesce(p.thawed_at, '-infinity')
   GROUP BY r.pool_name
), outage AS MATERIALIZED (
  SELECT pool_name FROM pools LEFT JOIN fallen USING (pool_name)
   WHERE CASE WHEN due > 0 AND NOT is_frozen AND silent + coalesce(marked, 0) > $2::int THEN (
     SELECT silent + coalesce(marked, 0) > $1::float8 * (members + coalesce(marked, 0))
            OR unheard > $2::int AND unheard > $10::float8 * members
       FROM sizes WHERE sizes.pool_name = pools.pool_name) ELSE false END
), frozen AS (
  INSERT INTO pool_state AS s (pool_name, frozen_at)
  SELECT pool_name, statement_timestamp() FROM outage ORDER BY pool_name
  ON CONFLICT (pool_name) DO UPDATE SET frozen_at = excluded.frozen_at, thawed_at = NULL
   WHERE s.thawed_at IS NOT NULL
  RETURNING pool_name
), due AS (
  SELECT a.agent_id, a.is_closed,
         p.is_frozen, row_number() OVER (PARTITION BY a.pool_name ORDER BY a.agent_id) AS place
    FROM alive a JOIN pools p USING (pool_name) LEFT JOIN fallen f USING (pool_name)
   WHERE (a.silence > a.lease_seconds * 4 / 3 OR a.is_closed AND a.is_settled AND NOT a.is_burst)
     AND a.pool_name NOT IN (SELECT pool_name FROM outage)
     -- A frozen pool is held for a while, then marked one by one: desktops do go home at night.
     AND (NOT p.is_frozen OR (
       p.frozen_at < statement_timestamp() - $3 * interval '1 second'
       AND coalesce(f.last_marked_at, '-infinity') < statement_timestamp() - interval '1 second'))
), locked AS (
  SELECT r.agent_id, due.is_closed FROM agent_registry r JOIN due USING (agent_id)
    LEFT JOIN closed c USING (agent_id)
   WHERE (NOT due.is_frozen OR due.place = 1) AND r.status IN ('online', 'busy')
     -- Of the row as it is when we hold it: a heartbeat that came meanwhile wins.
     AND CASE WHEN due.is_closed THEN r.last_heartbeat_at < c.closed_at
         ELSE coalesce(r.last_heartbeat_at, '-infinity') NOT BETWEEN
                statement_timestamp() - r.lease_seconds * 4 / 3 * interval '1 second'
                AND statement_timestamp() + interval '5 seconds' END
   ORDER BY r.agent_id FOR UPDATE OF r SKIP LOCKED
), marked AS (
  UPDATE agent_registry r SET status = 'offline', status_changed_at = statement_timestamp(),
    status_reason = CASE
      WHEN locked.is_closed THEN 'connection closed'
      WHEN r.last_heartbeat_at IS NULL THEN 'never heard of'
      ELSE format('missed %s heartbeats', floor(extract(epoch FROM
        statement_timestamp() - r.last_heartbeat_at) / r.interval_seconds)) END
    FROM locked WHERE r.agent_id = locked.agent_id
  RETURNING r.agent_id, r.hostname, r.pool_name, r.status_reason
)
SELECT agent_id, hostname, pool_name, status_reason FROM marked
UNION ALL
SELECT NULL, NULL, pool_name, NULL FROM frozen
"""

SUMMARY = f"""
SELECT statement_timestamp() AS as_of,
       {DEGRADED} OR EXISTS (SELECT FROM pool_state WHERE thawed_at IS NULL) AS degraded,
       ARRAY(SELECT pool_name FROM pool_state WHERE thawed_at IS NULL ORDER BY pool_name)
         AS frozen_pools,
       (SELECT coalesce(json_object_agg(status, agents), '{{}}') FROM (
         SELECT status, count(*) AS agents FROM agent_registry GROUP BY status) s) AS agents,
       (SELECT count(*) FROM agent_registry r
         WHERE r.status IN ('online', 'busy') AND NOT coalesce({FRESH}, false)) AS silent,
       (SELECT count(*) FROM reservation WHERE state = 'held') AS reservations,
       (SELECT count(*) FROM capacity_wait) AS waiting
"""  # noqa: S608

_AGENT = f"""
SELECT r.agent_id, r.agent_type, r.pool_name, r.capabilities, r.status, r.hostname,
       r.agent_version, r.incarnation, r.sequence, r.sent_at, r.interval_seconds,
       r.lease_seconds, r.drained, r.last_heartbeat_at, r.resource_metrics, r.performance_score,
       r.status_reason, r.status_changed_at, r.lower_incarnations, r.lower_incarnation_at,
       extract(epoch FROM statement_timestamp() - r.last_heartbeat_at)::float8 AS age_seconds,
       extract(epoch FROM r.sent_at - r.last_heartbeat_at)::float8 AS clock_skew_seconds,
       (SELECT queue_delay_seconds FROM ingest_path) AS queue_delay_seconds,
       NOT coalesce({FRESH}, false) AS is_silent,
       r.drain_reason, r.drained_at, r.drain_deadline, r.held, r.room
  FROM agent_registry r
"""  # noqa: S608
SHOW = _AGENT + " WHERE r.agent_id = $1"
SHOW_MANY = _AGENT + " WHERE r.agent_id = ANY($1::uuid[])"
LIST = (
    _AGENT
    + """
 WHERE ($1::text IS NULL OR r.status = $1) AND ($2::text IS NULL OR r.pool_name = $2)
   AND ($3::text IS NULL OR r.agent_type = $3)
   AND ($4::text IS NULL OR
        (r.pool_name, coalesce(r.hostname, ''), r.agent_id) > ($4, $5::text, $6::uuid))
 ORDER BY r.pool_name, coalesce(r.hostname, ''), r.agent_id LIMIT $7
"""
)

# Each change makes a new version of a row, by another transaction.
VERSIONS = "SELECT agent_id, xmin::text AS version FROM agent_registry"
