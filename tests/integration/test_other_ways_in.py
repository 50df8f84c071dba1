"""Heartbeats that come by RabbitMQ's own parts: MQTT, and a leaf broker with a shovel."""

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import declare
from chiffon.contract.codec import encode, routing_key
from chiffon.embedded import rabbitmq
from chiffon.embedded.children import free_port
from chiffon.embedded.rabbitmq import RabbitMQ
from chiffon.registry.registry import Registry
from tests.fixtures import mqtt, plain
from tests.fixtures.heartbeats import update
from tests.fixtures.servers import Management
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

pytestmark = pytest.mark.deep


@asynccontextmanager
async def own_broker(**options: Any) -> AsyncIterator[RabbitMQ]:
    """A private broker with the topology on it, whose plugins are nobody else's."""
    with tempfile.TemporaryDirectory(prefix="chiffon-own-", ignore_cleanup_errors=True) as folder:
        async with rabbitmq.run(Path(folder), stop_gently=False, **options) as node:
            connection = await dial_any(node.amqp_url, "test declares")
            await declare(connection)
            await connection.close()
            yield node


async def test_an_agent_that_speaks_mqtt_is_recorded(registry: Registry, database_url: str) -> None:
    port, one = free_port(), update()
    settings = {
        "mqtt.listeners.tcp.1": f"127.0.0.1:{port}",
        "mqtt.exchange": "chiffon.heartbeats",
        "mqtt.vhost": "chiffon",
    }
    async with own_broker(plugins=["rabbitmq_mqtt"], settings=settings) as node:
        login = urlsplit(node.amqp_url)
        async with (
            orchestrating(node.amqp_url, database_url),
            mqtt.connected(port, login.username or "", login.password or "", "rig-7") as client,
        ):
            await client.publish(routing_key(one).replace(".", "/"), encode(one))

            async def is_recorded() -> bool:
                return await registry.agents.show(one.agent_id) is not None

            await until(is_recorded, "the heartbeat")


async def test_a_shovel_carries_heartbeats_from_a_leaf_to_the_centre() -> None:
    """Type, routing key and expiration survive; the centre refuses a user id of the leaf's."""
    async with (
        own_broker(plugins=["rabbitmq_shovel", "rabbitmq_shovel_management"]) as leaf,
        own_broker() as centre,
    ):
        leaf_api, one = Management(leaf.management_url), update()
        leaf_api.call(
            "PUT",
            "parameters/shovel/chiffon/to-the-centre",
            {
                "value": {
                    "src-protocol": "amqp091",
                    "src-uri": leaf.amqp_url,
                    "src-queue": "chiffon.ingest",
                    "src-prefetch-count": 1000,
                    "dest-protocol": "amqp091",
                    "dest-uri": centre.amqp_url,
                    "dest-exchange": "chiffon.heartbeats",
                    "ack-mode": "on-confirm",
                }
            },
        )
        async with plain.channel(leaf.amqp_url) as to, plain.channel(centre.amqp_url) as at:
            queue = await at.get_queue("chiffon.ingest")
            properties = {"expiration": 15.0}
            key = routing_key(one)
            await plain.publish(
                to, "chiffon.heartbeats", key, encode(one), "status_update.v1", **properties
            )

            async def arrived() -> Any:
                return await queue.get(fail=False)

            message = await until(arrived, "the heartbeat at the centre")
            assert (message.type, message.routing_key) == ("status_update.v1", key)
            assert message.expiration == 15.0, "as it was: it does not count the time on the leaf"
            assert message.user_id is None
            assert json.loads(message.body)["agent_id"] == str(one.agent_id)
            await message.ack()

            async def is_empty() -> bool:
                found = leaf_api.call("GET", "queues/chiffon/chiffon.ingest")
                return bool(found.get("messages", 1) == 0)

            await until(is_empty, "the leaf's queue is acknowledged after the centre's confirm")

        # What a leaf's own user signed, the centre's broker does not let the shovel repeat.
        leaf_api.call("PUT", "users/agent-7", {"password": "secret", "tags": ""})
        rights = {"configure": "", "write": ".*", "read": ""}
        leaf_api.call("PUT", "permissions/chiffon/agent-7", rights)
        own = urlsplit(leaf.amqp_url)
        signed_url = own._replace(netloc=f"agent-7:secret@{own.hostname}:{own.port}").geturl()
        async with plain.channel(signed_url) as to:
            await plain.publish(
                to, "chiffon.heartbeats", key, encode(one), "status_update.v1", user_id="agent-7"
            )

        async def is_ended() -> bool:
            shovels = leaf_api.call("GET", "shovels/chiffon")
            return any(each.get("state") != "running" for each in shovels)

        await until(is_ended, "the shovel stopped by the centre")
