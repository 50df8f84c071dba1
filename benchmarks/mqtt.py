"""What a connection costs the broker: by AMQP, as an agent has it, and by RabbitMQ's MQTT plugin.

    python -m benchmarks.mqtt --connections 1000

A private RabbitMQ for each. Every connection publishes one heartbeat, confirmed, and stays open;
what the broker's memory has grown by is divided by their number.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.connections import memory
from benchmarks.stage import Fleet
from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import ensure
from chiffon.amqp.publisher import Properties, publish
from chiffon.contract.messages import STATUS_UPDATE
from chiffon.contract.topology import HEARTBEATS
from chiffon.embedded import rabbitmq
from chiffon.embedded.children import free_port
from tests.fixtures import mqtt

SETTLE_SECONDS = 10.0
"""Until the broker has given back what it needed only to open connections."""


@asynccontextmanager
async def broker(port: int) -> AsyncIterator[rabbitmq.RabbitMQ]:
    """Run a broker with the topology on it, which speaks MQTT at ``port``."""
    settings = {
        "mqtt.listeners.tcp.1": f"127.0.0.1:{port}",
        "mqtt.exchange": "chiffon.heartbeats",
        "mqtt.vhost": rabbitmq.VHOST,
    }
    with tempfile.TemporaryDirectory(prefix="chiffon-mqtt-") as folder:
        async with rabbitmq.run(
            Path(folder), stop_gently=False, plugins=["rabbitmq_mqtt"], settings=settings
        ) as node:
            await ensure(lambda: dial_any(node.amqp_url, "benchmark declares"))
            yield node


async def speak_amqp(stack: AsyncExitStack, url: str, key: str, body: bytes) -> None:
    """Connect as an agent does, publish, and stay."""
    connection = await dial_any(url, "benchmark")
    stack.push_async_callback(connection.close)
    properties = Properties(message_type=STATUS_UPDATE, content_type="application/json")
    await publish(
        await connection.channel(),
        body,
        exchange=HEARTBEATS,
        routing_key=key,
        properties=properties,
        timeout=30,
    )


async def measure(protocol: str, connections: int) -> float:
    """Return by how many bytes the broker grows for each connection."""
    port, heartbeats = free_port(), Fleet(connections).heartbeats()
    async with broker(port) as node, AsyncExitStack() as stack:
        login, pid = urlsplit(node.amqp_url), node.child.process.pid
        await asyncio.sleep(SETTLE_SECONDS)
        empty = memory(pid)
        for number in range(connections):
            key, body = next(heartbeats)
            if protocol == "AMQP":
                await speak_amqp(stack, node.amqp_url, key, body)
            else:
                client = await stack.enter_async_context(
                    mqtt.connected(port, login.username or "", login.password or "", f"{number}")
                )
                await client.publish(key.replace(".", "/"), body)
        await asyncio.sleep(SETTLE_SECONDS)
        return (memory(pid) - empty) / connections


async def main() -> None:
    """Measure both, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1_000)
    connections = parser.parse_args().connections
    sizes = {name: await measure(name, connections) for name in ("AMQP", "MQTT")}
    for name, size in sizes.items():
        share = size / sizes["AMQP"]
        print(f"{name}: {size / 1024:.0f} KiB a connection, {share:.2f} of AMQP's")


if __name__ == "__main__":
    asyncio.run(main())
