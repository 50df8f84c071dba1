"""A registry that the database itself fills, to a million agents, and agents of it who speak."""

import json
from collections.abc import Sequence
from uuid import UUID

import asyncpg

from benchmarks.stage import Fleet

# All is drawn by the database, from a seed: a million rows come in half a minute.
FILL = """
INSERT INTO agent_registry (agent_id, agent_type, pool_name, capabilities, status, hostname,
                            agent_version, incarnation, sequence, last_heartbeat_at,
                            lease_seconds, interval_seconds, resource_metrics)
SELECT gen_random_uuid(), 'desktop', CASE WHEN n <= 50 THEN 'small' ELSE 'pool-' || n % 20 END,
       '["gpu"]', 'online', 'rig-' || n, '0.1.0', 1, 1, now(), 1e6, 600,
       jsonb_build_object(
         'cpu_percent', round((random() * 100)::numeric, 1), 'cpu_cores_physical', 128,
         'cpu_cores_available',
         CASE WHEN n % 200 = 0 THEN 100 ELSE (random() * 16)::int END,
         'cpu_load_1min', 1.0, 'cpu_load_5min', 1.0, 'memory_percent', 10.0,
         'memory_available_gb', round((random() * 64)::numeric, 2), 'gpu_vram_total_gb', 80.0,
         'gpu_vram_available_gb', round((random() * 48)::numeric, 2), 'gpu_type', 'nvidia')
  FROM generate_series($1::int, $2::int) n
"""
GIN = "idx_agent_registry_resource_metrics"
# Locked as a whole: what is left of the load updates rows in another order.
SILENCE = """
LOCK TABLE agent_registry IN EXCLUSIVE MODE;
UPDATE agent_registry SET last_heartbeat_at = now() - interval '30 days' WHERE random() < 0.75
"""
# A future canary: nobody is marked offline, and nothing is degraded, while we measure.
TRUST = """
INSERT INTO ingest_path (fresh_at, proves_seconds, fresh_since, grace_until)
VALUES (now(), 5, now(), now() - interval '1 day')
ON CONFLICT (only_row) DO UPDATE SET fresh_since = now(), grace_until = excluded.grace_until
"""


async def fill(database: "asyncpg.Connection[asyncpg.Record]", agents: int) -> None:
    """Replace the registry by so many agents; the big index is made last, which is faster."""
    definition = await database.fetchval(
        "SELECT indexdef FROM pg_indexes WHERE indexname = $1", GIN
    )
    await database.execute(f"TRUNCATE agent_registry; DROP INDEX {GIN}")
    await database.execute("SELECT setseed(0.5)")
    for start in range(1, agents + 1, 100_000):
        await database.execute(FILL, start, min(start + 99_999, agents))
    await database.execute(definition)
    await database.execute("VACUUM ANALYZE agent_registry")
    await database.execute(TRUST)
    await database.execute("CHECKPOINT")  # so that it does not write all this while we measure


class Speakers(Fleet):
    """Agents of a registry, who say the like of what they were filled with.

    Args:
        listed: Their ids and pools, and who of them has cores that few have.
    """

    def __init__(self, listed: Sequence[tuple[str, str, bool]]) -> None:
        super().__init__(0)
        self.agent_ids = [UUID(one[0]) for one in listed]
        self.pools = [one[1] for one in listed]
        self._has_many = [one[2] for one in listed]

    def metrics(self, number: int) -> str:
        """Return the next readings of an agent, as ``FILL`` draws them."""
        metrics = json.loads(super().metrics(number))
        cores = 100 if self._has_many[number] else metrics["cpu_cores_available"]
        vram = round(metrics["gpu_vram_available_gb"] * 2, 2)
        changed = {"cpu_cores_physical": 128, "cpu_cores_available": cores}
        changed |= {"gpu_vram_total_gb": 80.0, "gpu_vram_available_gb": vram}
        return json.dumps(metrics | changed)
