"""Reservations: room on agents that planners hold, and what they leave of it.

What is held on an agent stands in the agent's own row, so that all that admits a reservation is
in one row: a claim is an update of that row on its condition, and whoever comes second sees what
the first took. ``room`` is what is left for others, NULL where nothing is held.
"""

import re
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# Rows may have been written by others: nothing below may fail on what they hold.
_NUMBER = """
CREATE FUNCTION chiffon_number(value jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE jsonb_typeof(value)
    WHEN 'number' THEN least(greatest(value::numeric, -1e15), 1e15) END
$$
"""

_ELEMENTS = """
CREATE FUNCTION chiffon_elements(value jsonb) RETURNS SETOF jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT jsonb_array_elements(
    CASE jsonb_typeof(value) WHEN 'array' THEN value ELSE '[]' END)
$$
"""

_GPU_KEY = """
CREATE FUNCTION chiffon_gpu_key(gpu jsonb) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE jsonb_typeof(gpu -> 'uuid') WHEN 'string' THEN gpu ->> 'uuid'
         ELSE 'index ' || coalesce(gpu ->> 'index', '0') END
$$
"""

# What is left of one resource, of which `live` is free now: the rule of docs/reservations.md.
# The arrays are in the order of fences: what was taken, what was free before that, and what is
# observed to be in use of it, NULL where nobody knows.
_LEFT = """
CREATE FUNCTION chiffon_left(
  live numeric, total numeric, taken numeric[], free_before numeric[], observed numeric[])
RETURNS numeric LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
  idle numeric := live;
  most numeric;
  reserved numeric := 0;
  pending numeric := 0;
  unexplained numeric := 0;
  vague int[] := '{}';
  until_next numeric;
BEGIN
  IF live IS NULL THEN RETURN 0; END IF;
  FOR i IN 1 .. coalesce(array_length(taken, 1), 0) LOOP
    reserved := reserved + taken[i];
    IF observed[i] IS NULL THEN
      vague := vague || i;
    ELSE
      idle := idle + observed[i];
      pending := pending + greatest(taken[i] - observed[i], 0);
    END IF;
  END LOOP;
  most := idle;
  FOR i IN 1 .. coalesce(array_length(taken, 1), 0) LOOP
    most := greatest(most, free_before[i]);
  END LOOP;
  -- What became less between one reservation and the next is the use of that one or of an earlier
  -- one, and of no later one.
  FOR n IN 1 .. coalesce(array_length(vague, 1), 0) LOOP
    until_next := greatest(coalesce(free_before[vague[n + 1]], idle), idle);
    unexplained := greatest(0, unexplained + taken[vague[n]]
                               - greatest(0, free_before[vague[n]] - until_next));
  END LOOP;
  RETURN greatest(0, least(coalesce(total, most) - reserved, live - pending - unexplained));
END $$
"""

# All that is left on an agent. Each GPU with `left`, and with `idle`: what would be free if those
# reservations used nothing of which the use is observed.
_ROOM = """
CREATE FUNCTION chiffon_room(metrics jsonb, held jsonb) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
  vendor text := metrics ->> 'gpu_type';
  scalar numeric := chiffon_number(metrics -> 'gpu_vram_available_gb');
  kept_back numeric := coalesce(chiffon_number(metrics #> '{kept,gpu_vram_gb}'), 0);
  listed boolean := EXISTS (SELECT FROM chiffon_elements(metrics -> 'gpus'));
  ids text[];
  holdings jsonb[];
  seen jsonb[];
  gpu jsonb;
  gpu_key text;
  part jsonb;
  gpus jsonb := '[]';
  vram numeric := 0;
  single numeric := 0;
  live numeric;
  cores jsonb;
  memory jsonb;
  left_here numeric;
  taken numeric[];
  free_before numeric[];
  observed numeric[];
BEGIN
  SELECT coalesce(array_agg(h.key ORDER BY (h.value ->> 'fence')::bigint), '{}'),
         coalesce(array_agg(h.value ORDER BY (h.value ->> 'fence')::bigint), '{}')
    INTO ids, holdings
    FROM jsonb_each(CASE jsonb_typeof(held) WHEN 'object' THEN held ELSE '{}' END) h;
  FOR i IN 1 .. cardinality(ids) LOOP
    seen[i] := (SELECT o FROM chiffon_elements(metrics -> 'observed') o
                 WHERE o ->> 'reservation_id' = ids[i] LIMIT 1);
  END LOOP;

  taken := '{}'; free_before := '{}'; observed := '{}';
  FOR i IN 1 .. cardinality(ids) LOOP
    taken[i] := (holdings[i] #>> '{cores,0}')::numeric;
    free_before[i] := (holdings[i] #>> '{cores,1}')::numeric;
    -- What is free is told in whole cores, so what is busy of one counts as one.
    observed[i] := ceil(chiffon_number(seen[i] -> 'cpu_cores'));
  END LOOP;
  live := CASE WHEN jsonb_typeof(metrics) = 'object' AND NOT metrics ? 'cpu_cores_available'
          THEN 1 ELSE coalesce(chiffon_number(metrics -> 'cpu_cores_available'), 0) END;
  cores := jsonb_build_object('left', floor(chiffon_left(live, NULL, taken, free_before, observed)),
             'idle', live + coalesce((SELECT sum(o) FROM unnest(observed) o), 0));

  taken := '{}'; free_before := '{}'; observed := '{}';
  FOR i IN 1 .. cardinality(ids) LOOP
    taken[i] := (holdings[i] #>> '{memory,0}')::numeric;
    free_before[i] := (holdings[i] #>> '{memory,1}')::numeric;
    observed[i] := chiffon_number(seen[i] -> 'memory_gb');
  END LOOP;
  live := coalesce(chiffon_number(metrics -> 'memory_available_gb'), 0);
  memory := jsonb_build_object('left', chiffon_left(live, NULL, taken, free_before, observed),
              'idle', live + coalesce((SELECT sum(o) FROM unnest(observed) o), 0));

  FOR gpu IN
    SELECT g FROM chiffon_elements(metrics -> 'gpus') g
    UNION ALL
    SELECT jsonb_build_object('index', 0, 'vram_total_gb', metrics -> 'gpu_vram_total_gb',
                              'vram_available_gb', metrics -> 'gpu_vram_available_gb')
     WHERE NOT listed AND scalar IS NOT NULL AND vendor IS DISTINCT FROM 'none'
  LOOP
    live := chiffon_number(gpu -> 'vram_available_gb');
    -- A card with more than the scalar is another vendor's, unless it is a matter of rounding.
    CONTINUE WHEN live IS NULL OR live > coalesce(scalar, 0) + 0.1
               OR jsonb_typeof(gpu -> 'gpu_type') = 'string' AND gpu ->> 'gpu_type' <> vendor;
    gpu_key := chiffon_gpu_key(gpu);
    taken := '{}'; free_before := '{}'; observed := '{}';
    FOR i IN 1 .. cardinality(ids) LOOP
      -- A driver may fail to tell a GPU's UUID for once: then its index is what it is known by.
      FOR part IN
        SELECT e.value FROM jsonb_each(holdings[i] -> 'gpus') e
         WHERE e.key = gpu_key OR NOT listed
            OR (jsonb_typeof(gpu -> 'uuid') IS DISTINCT FROM 'string' OR e.key LIKE 'index %')
               AND e.value ->> 2 = gpu ->> 'index'
      LOOP
        taken := taken || (part ->> 0)::numeric;
        free_before := free_before || (part ->> 1)::numeric;
        -- A GPU that is not listed is not used; of one without a number nobody knows.
        observed := observed || CASE WHEN seen[i] IS NOT NULL THEN (
          SELECT CASE WHEN bool_and(chiffon_number(o -> 'vram_gb') IS NOT NULL) IS NOT FALSE
                 THEN coalesce(sum(chiffon_number(o -> 'vram_gb')), 0) END
            FROM chiffon_elements(seen[i] -> 'gpus') o
           WHERE jsonb_typeof(o) = 'object' AND chiffon_gpu_key(o) = gpu_key) END;
      END LOOP;
    END LOOP;
    left_here := chiffon_left(
      live, chiffon_number(gpu -> 'vram_total_gb') - kept_back, taken, free_before, observed);
    -- Such a card has no memory of its own: what jobs hold of the host's is gone for it as well.
    IF gpu -> 'is_unified' = 'true' THEN
      left_here := least(left_here, (memory ->> 'left')::numeric);
    END IF;
    vram := vram + left_here;
    single := greatest(single, left_here);
    gpus := gpus || jsonb_build_object(
      'key', gpu_key,
      'uuid', CASE jsonb_typeof(gpu -> 'uuid') WHEN 'string' THEN gpu -> 'uuid' END,
      'index', greatest(floor(coalesce(chiffon_number(gpu -> 'index'), 0)), 0)::bigint,
      'is_unified', coalesce(gpu -> 'is_unified' = 'true', false),
      'left', left_here, 'idle', live + coalesce((SELECT sum(o) FROM unnest(observed) o), 0));
  END LOOP;
  RETURN jsonb_build_object('gpus', gpus, 'vram', least(vram, coalesce(scalar, 0)),
                            'single', single, 'cores', cores, 'memory', memory);
END $$
"""

_ROOM_LEFT = """
CREATE FUNCTION chiffon_room_left(metrics jsonb, held jsonb) RETURNS float8[]
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
  room jsonb := chiffon_room(metrics, held);
BEGIN
  RETURN ARRAY[(room ->> 'vram')::float8, (room ->> 'single')::float8,
               (room #>> '{cores,left}')::float8, (room #>> '{memory,left}')::float8];
END $$
"""

# What a reservation would take on an agent, in the form in which it is held; NULL if it does not
# fit. The GPUs with most room are taken first.
_TAKE = """
CREATE FUNCTION chiffon_take(
  metrics jsonb, held jsonb, gpus int, vram numeric, cores numeric, memory numeric)
RETURNS jsonb LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
  room jsonb := chiffon_room(metrics, held);
  chosen jsonb := '[]';
BEGIN
  -- Every heartbeat looks at all of them.
  IF jsonb_typeof(held) = 'object' AND (SELECT count(*) FROM jsonb_object_keys(held)) >= 128
  THEN RETURN NULL; END IF;
  IF vram > 0 THEN
    chosen := coalesce((
      SELECT jsonb_agg(g) FROM (
        SELECT g FROM chiffon_elements(room -> 'gpus') g WHERE (g ->> 'left')::numeric >= vram
         ORDER BY (g ->> 'left')::numeric DESC, chiffon_number(g -> 'index'), g ->> 'key'
         LIMIT gpus) best), '[]');
    IF jsonb_array_length(chosen) < gpus THEN RETURN NULL; END IF;
    memory := memory + vram * (
      SELECT count(*) FROM chiffon_elements(chosen) g WHERE g -> 'is_unified' = 'true');
  END IF;
  IF (room #>> '{cores,left}')::numeric < cores OR (room #>> '{memory,left}')::numeric < memory
  THEN RETURN NULL; END IF;
  RETURN jsonb_build_object(
    'gpus', coalesce((SELECT jsonb_object_agg(
                         g ->> 'key', jsonb_build_array(vram, g -> 'idle', g -> 'index'))
                        FROM chiffon_elements(chosen) g), '{}'),
    'cores', jsonb_build_array(cores, room #> '{cores,idle}'),
    'memory', jsonb_build_array(memory, room #> '{memory,idle}'),
    'chosen', (SELECT coalesce(jsonb_agg(jsonb_build_object(
                 'uuid', g -> 'uuid', 'index', g -> 'index', 'vram_gb', vram)), '[]')
                 FROM chiffon_elements(chosen) g));
END $$
"""

_FUNCTIONS = {
    "chiffon_number(jsonb)": _NUMBER,
    "chiffon_elements(jsonb)": _ELEMENTS,
    "chiffon_gpu_key(jsonb)": _GPU_KEY,
    "chiffon_left(numeric, numeric, numeric[], numeric[], numeric[])": _LEFT,
    "chiffon_room(jsonb, jsonb)": _ROOM,
    "chiffon_room_left(jsonb, jsonb)": _ROOM_LEFT,
    "chiffon_take(jsonb, jsonb, int, numeric, numeric, numeric)": _TAKE,
}

_OFFERED = sa.text("status = 'online' AND metrics_sound")


def upgrade() -> None:
    # By their schema's name: a dump is restored without a search path, and computes the column.
    schema = op.get_bind().execute(sa.text("SELECT quote_ident(current_schema())")).scalar_one()
    for statement in _FUNCTIONS.values():
        op.execute(re.sub(r"\bchiffon_(\w+)\(", rf"{schema}.chiffon_\1(", statement))
    op.add_column("agent_registry", sa.Column("held", JSONB()))
    room = sa.Computed(
        "CASE WHEN jsonb_typeof(held) = 'object'"
        " THEN chiffon_room_left(resource_metrics, held) END",
        persisted=True,
    )
    op.add_column("agent_registry", sa.Column("room", ARRAY(sa.Float()), room))
    op.add_column("agent_registry", sa.Column("drain_reason", sa.Text()))
    op.add_column("agent_registry", sa.Column("drained_at", sa.DateTime(timezone=True)))
    op.add_column("agent_registry", sa.Column("drain_deadline", sa.DateTime(timezone=True)))
    op.drop_index("idx_agent_registry_offers", table_name="agent_registry")
    op.create_index(
        "idx_agent_registry_offers",
        "agent_registry",
        [
            sa.text("coalesce(room[1], free_vram_gb) DESC"),
            sa.text("coalesce(room[3], free_cores) DESC"),
            sa.text("performance_score DESC"),
            "agent_id",
        ],
        postgresql_where=_OFFERED,
    )
    op.create_index(
        "idx_agent_registry_held",
        "agent_registry",
        ["agent_id"],
        postgresql_where=sa.text("held IS NOT NULL"),
    )
    op.execute("CREATE SEQUENCE reservation_fence AS bigint")
    op.create_table(
        "reservation",
        sa.Column("reservation_id", sa.Uuid(), primary_key=True),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Uuid()),
        sa.Column("request_hash", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, server_default="held"),
        sa.Column("reason", sa.Text()),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("lease_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("asked", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("gpu_vram_gb", sa.Float(), nullable=False),
        sa.Column("cpu_cores", sa.Integer(), nullable=False),
        sa.Column("memory_gb", sa.Float(), nullable=False),
        sa.Column("agent_ids", ARRAY(sa.Uuid()), nullable=False),
        sa.Column("places", JSONB(), nullable=False),
        sa.Column("alternative", sa.Integer(), nullable=False, server_default="0"),
        sa.CheckConstraint(
            "state IN ('held', 'released', 'expired', 'revoked')", name="reservation_state_is_known"
        ),
        sa.CheckConstraint(
            "(state = 'held') = (ended_at IS NULL)", name="reservation_ended_has_a_time"
        ),
        sa.UniqueConstraint("holder", "idempotency_key", name="reservation_key"),
        sa.UniqueConstraint("fence", name="reservation_fence_is_unique"),
    )
    op.create_index(
        "idx_reservation_held",
        "reservation",
        ["expires_at"],
        postgresql_where=sa.text("state = 'held'"),
    )
    op.create_index(
        "idx_reservation_ended",
        "reservation",
        ["ended_at"],
        postgresql_where=sa.text("state <> 'held'"),
    )
    op.create_table(
        "capacity_wait",
        sa.Column("wait_id", sa.Uuid(), primary_key=True),
        sa.Column("place", sa.BigInteger(), sa.Identity(), nullable=False, unique=True),
        sa.Column("question", JSONB(), nullable=False),
        sa.Column("deadline", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reply", JSONB(), nullable=False),
        sa.Column("answering_until", sa.DateTime(timezone=True)),
        sa.Column("tries", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("offered_at", sa.DateTime(timezone=True)),
        sa.Column("offered_agent_id", sa.Uuid()),
    )


def downgrade() -> None:
    op.drop_table("capacity_wait")
    op.drop_table("reservation")
    op.execute("DROP SEQUENCE reservation_fence")
    op.drop_index("idx_agent_registry_held", table_name="agent_registry")
    op.drop_index("idx_agent_registry_offers", table_name="agent_registry")
    for name in ("drain_deadline", "drained_at", "drain_reason", "room", "held"):
        op.drop_column("agent_registry", name)
    op.create_index(
        "idx_agent_registry_offers",
        "agent_registry",
        [
            sa.text("free_vram_gb DESC"),
            sa.text("free_cores DESC"),
            sa.text("performance_score DESC"),
            "agent_id",
        ],
        postgresql_where=_OFFERED,
    )
    for name in reversed(_FUNCTIONS):
        op.execute(f"DROP FUNCTION {name}")
