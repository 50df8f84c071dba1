"""The least that can answer a planner: it consumes the queue and sends the same body each time.

The body is what a real answer was, from the file that the environment names.
"""

import asyncio
import os
from pathlib import Path

import aio_pika


async def main(body: bytes) -> None:
    """Answer for ever."""
    connection = await aio_pika.connect(os.environ["CHIFFON_AMQP_URL"])
    channel = await connection.channel(publisher_confirms=False)
    await channel.set_qos(prefetch_count=64)
    queue = await channel.declare_queue("chiffon.capacity", auto_delete=True)
    await queue.bind("chiffon.rpc", "capacity")

    async def answer(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        reply = aio_pika.Message(
            body,
            correlation_id=message.correlation_id,
            type="capacity.offers.v1",
            content_type="application/json",
        )
        await channel.default_exchange.publish(reply, routing_key=message.reply_to or "")
        await message.ack()

    await queue.consume(answer)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(os.environ["ANSWER"]).read_bytes()))
