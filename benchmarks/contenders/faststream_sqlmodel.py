"""A FastStream subscriber that writes each heartbeat with one upsert of the SQLModel table."""

import asyncio
import os

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitExchange, RabbitQueue
from sqlalchemy import func
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from chiffon.contract.messages import StatusUpdate
from chiffon.registry.tables import AgentRegistry

engine = create_async_engine(os.environ["CHIFFON_DATABASE_URL"], pool_size=10)
sessions = async_sessionmaker(engine)
broker = RabbitBroker(
    os.environ["CHIFFON_AMQP_URL"], default_channel=Channel(prefetch_count=100), logger=None
)


@broker.subscriber(RabbitQueue("chiffon.ingest", declare=False), RabbitExchange(declare=False))
async def record(update: StatusUpdate) -> None:
    """Record one heartbeat."""
    async with sessions() as connection:
        await connection.execute(upsert(update))
        await connection.commit()


def upsert(update: StatusUpdate) -> Insert:
    """Return the statement that keeps the newest heartbeat of an agent."""
    resources = update.resources.model_dump(mode="json") if update.resources else {}
    values = {
        "agent_id": update.agent_id,
        "agent_type": update.agent_type,
        "pool_name": update.pool_name,
        "capabilities": update.capabilities,
        "status": update.status,
        "hostname": update.hostname,
        "agent_version": update.agent_version,
        "incarnation": update.incarnation,
        "sequence": update.sequence,
        "sent_at": update.sent_at,
        "interval_seconds": update.interval_seconds,
        "lease_seconds": 3 * update.interval_seconds,
        "last_heartbeat_at": func.now(),
        "resource_metrics": resources,
    }
    statement = insert(AgentRegistry).values(values)
    changed = {name: statement.excluded[name] for name in values if name != "agent_id"}
    return statement.on_conflict_do_update(
        index_elements=["agent_id"],
        set_=changed,
        where=AgentRegistry.sequence < statement.excluded.sequence,
    )


if __name__ == "__main__":
    asyncio.run(FastStream(broker).run())
