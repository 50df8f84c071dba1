"""An aio-pika iterator with one upsert and one acknowledgement a message, over asyncpg."""

import asyncio
import os

import aio_pika
import asyncpg

from chiffon.contract.messages import StatusUpdate
from chiffon.embedded.postgres import asyncpg_url

UPSERT = """
INSERT INTO agent_registry AS r (agent_id, agent_type, pool_name, capabilities, status, hostname,
  agent_version, incarnation, sequence, sent_at, interval_seconds, lease_seconds,
  last_heartbeat_at, resource_metrics)
VALUES ($1, $2, $3, $4::jsonb, $5, $6, $7, $8, $9, $10, $11, $12, now(), $13::jsonb)
ON CONFLICT (agent_id) DO UPDATE SET
  agent_type = excluded.agent_type, pool_name = excluded.pool_name,
  capabilities = excluded.capabilities, status = excluded.status, hostname = excluded.hostname,
  agent_version = excluded.agent_version, incarnation = excluded.incarnation,
  sequence = excluded.sequence, sent_at = excluded.sent_at,
  interval_seconds = excluded.interval_seconds, lease_seconds = excluded.lease_seconds,
  last_heartbeat_at = excluded.last_heartbeat_at, resource_metrics = excluded.resource_metrics
WHERE (r.incarnation, r.sequence) < (excluded.incarnation, excluded.sequence)
"""


async def main() -> None:
    """Record heartbeats one by one, for ever."""
    database = await asyncpg.connect(asyncpg_url(os.environ["CHIFFON_DATABASE_URL"]))
    connection = await aio_pika.connect_robust(os.environ["CHIFFON_AMQP_URL"])
    channel = await connection.channel()
    await channel.set_qos(prefetch_count=100)
    queue = await channel.get_queue("chiffon.ingest", ensure=False)
    async with queue.iterator() as messages:
        async for message in messages:
            async with message.process():
                await database.execute(UPSERT, *row(StatusUpdate.model_validate_json(message.body)))


def row(update: StatusUpdate) -> tuple[object, ...]:
    """Return the arguments of the statement."""
    import json

    return (
        update.agent_id,
        update.agent_type,
        update.pool_name,
        json.dumps(update.capabilities),
        update.status,
        update.hostname,
        update.agent_version,
        update.incarnation,
        update.sequence,
        update.sent_at,
        update.interval_seconds,
        3 * update.interval_seconds,
        update.resources.model_dump_json() if update.resources else "{}",
    )


if __name__ == "__main__":
    asyncio.run(main())
