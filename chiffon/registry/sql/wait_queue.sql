-- Who waits for room, in the order of `position`. Whoever answers one takes it for some seconds.

-- name: join
-- Go to the end of the queue, unless it is full; who is in it keeps the position.
INSERT INTO wait_queue AS w (wait_id, request, deadline, reply)
SELECT :wait_id::uuid, :request::jsonb,
       statement_timestamp() + :timeout_seconds::float8 * interval '1 second', :reply::jsonb
 WHERE (SELECT count(*) FROM wait_queue) < :most::bigint
    OR EXISTS (SELECT FROM wait_queue WHERE wait_id = :wait_id)
ON CONFLICT (wait_id) DO UPDATE SET
  reply = excluded.reply, request = excluded.request, deadline = excluded.deadline,
  answering_until = NULL, tries = 0, offered_at = NULL, offered_agent_id = NULL
RETURNING wait_id

-- name: waiting
-- Those whose time is up, and of the different requests that came first those who came first.
WITH waiting AS (
  SELECT wait_id, request, reply, position, deadline <= statement_timestamp() AS is_over,
         CASE jsonb_typeof(request) WHEN 'object'
           THEN request - ARRAY['timeout_seconds', 'wait_id', 'limit'] END AS needs
    FROM wait_queue WHERE offered_at IS NULL
), ranked AS (
  SELECT *, row_number() OVER (PARTITION BY needs ORDER BY position) AS among_its_kind,
         min(position) OVER (PARTITION BY needs) AS first_of_its_kind
    FROM waiting
), numbered AS (
  SELECT *, dense_rank() OVER (ORDER BY first_of_its_kind) AS kind FROM ranked
)
SELECT wait_id, request, reply, is_over, kind FROM numbered
 WHERE is_over OR kind <= :most_kinds::bigint AND among_its_kind <= :most_of_one::bigint
 ORDER BY position

-- name: offered_lately
-- Agents that somebody was offered and has time to reserve.
SELECT DISTINCT offered_agent_id FROM wait_queue
 WHERE offered_at > statement_timestamp() - :seconds::float8 * interval '1 second'
   AND offered_agent_id IS NOT NULL

-- name: begin_answering
-- Of these, those that nobody else is answering: ours for some seconds.
UPDATE wait_queue SET tries = tries + 1,
       answering_until = statement_timestamp() + :seconds::float8 * interval '1 second'
 WHERE wait_id IN (
   SELECT wait_id FROM wait_queue
    WHERE wait_id = ANY(:wait_ids::uuid[]) AND offered_at IS NULL
      AND coalesce(answering_until, '-infinity') <= statement_timestamp()
    ORDER BY position FOR UPDATE SKIP LOCKED)
RETURNING wait_id, tries

-- name: note_offers
-- Note who was offered which agent first: they may come back to their positions.
UPDATE wait_queue w SET offered_at = statement_timestamp(), offered_agent_id = o.agent_id
  FROM unnest(:wait_ids::uuid[], :agent_ids::uuid[]) AS o (wait_id, agent_id)
 WHERE w.wait_id = o.wait_id

-- name: leave
-- Remove these, and who was offered something a while ago.
DELETE FROM wait_queue
 WHERE wait_id = ANY(:wait_ids::uuid[])
    OR offered_at < statement_timestamp() - :kept_seconds::float8 * interval '1 second'
