"""A FastStream subscriber that answers the same question with the same query."""

import asyncio
import os

from faststream import FastStream
from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityOffers, CapacityQuery
from chiffon.registry.registry import Registry

QUEUE = "benchmark.capacity"

broker = RabbitBroker(
    os.environ["CHIFFON_AMQP_URL"], default_channel=Channel(prefetch_count=64), logger=None
)
service: OrchestratorService


@broker.subscriber(RabbitQueue(QUEUE, auto_delete=True))
async def find(query: CapacityQuery) -> CapacityOffers:
    """Answer one question."""
    return await service.find(query)


async def main() -> None:
    """Answer for ever."""
    global service
    async with Registry.open(os.environ["CHIFFON_DATABASE_URL"]) as registry:
        service = OrchestratorService(registry)
        await FastStream(broker).run()


if __name__ == "__main__":
    asyncio.run(main())
