"""A program that is not chiffon takes part, straight from the tables of the design.

Bodies, keys and properties are written by hand and sent by plain aio-pika; rows are read by
plain asyncpg. Nothing here imports chiffon.
"""

import json
from typing import Any
from uuid import uuid4

import aio_pika
import asyncpg

from tests.fixtures.heartbeats import HEARTBEAT
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until


async def test_a_hand_written_heartbeat_is_recorded_and_offered(
    amqp_url: str, database_url: str
) -> None:
    agent_id = str(uuid4())
    heartbeat = json.loads(HEARTBEAT.read_text()) | {
        "agent_id": agent_id,
        "agent_type": "research",
        "pool_name": "lab-2",
        "capabilities": ["gpu", "cuda12"],
    }
    # The contract is the scalars; a program that lists no GPUs takes part as well.
    for name in ("gpus", "probe_errors"):
        del heartbeat["resources"][name]
    async with orchestrating(amqp_url, database_url):
        connection = await aio_pika.connect(amqp_url)
        channel = await connection.channel(on_return_raises=True)
        heartbeats = await channel.get_exchange("chiffon.heartbeats")
        await heartbeats.publish(
            aio_pika.Message(
                json.dumps(heartbeat).encode(),
                type="status_update.v1",
                content_type="application/json",
                expiration=15,
            ),
            routing_key=f"heartbeat.lab-2.research.{agent_id}",
        )

        database = await asyncpg.connect(database_url.replace("+asyncpg", ""))

        async def row() -> Any:
            return await database.fetchrow(
                "SELECT status, pool_name, resource_metrics FROM agent_registry"
                " WHERE agent_id = $1",
                agent_id,
            )

        kept = await until(row, "the row")
        assert (kept["status"], kept["pool_name"]) == ("online", "lab-2")
        metrics = json.loads(kept["resource_metrics"])
        assert metrics["gpu_vram_available_gb"] == 20.5
        await database.close()

        replies = await channel.declare_queue(exclusive=True)
        rpc = await channel.get_exchange("chiffon.rpc")

        async def ask(kind: str, question: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
            await rpc.publish(
                aio_pika.Message(
                    json.dumps(question).encode(),
                    type=kind,
                    correlation_id="7",
                    reply_to=replies.name,
                    expiration=5,
                ),
                routing_key="capacity",
            )

            async def arrived() -> Any:
                return await replies.get(fail=False, no_ack=True)

            reply = await until(arrived, f"a reply to {kind}")
            assert reply.correlation_id == "7"
            return reply.type, json.loads(reply.body)

        kind, offers = await ask(
            "capacity.find.v1",
            {"min_gpu_vram_gb": 16, "agent_type": None, "capabilities": ["cuda12"]},
        )
        assert kind == "capacity.offers.v1"
        assert (offers["total_matches"], offers["total_relation"]) == (1, "eq")
        [offer] = offers["agents"]
        assert set(offer) == {
            "agent_id",
            "agent_type",
            "pool_name",
            "hostname",
            "status",
            "gpu_type",
            "gpu_vram_available_gb",
            "gpu_vram_max_available_gb",
            "gpu_vram_total_gb",
            "gpu_sample_age_seconds",
            "cpu_cores_available",
            "cpu_load_1min",
            "memory_available_gb",
            "performance_score",
            "last_heartbeat_at",
            "heartbeat_age_seconds",
        }
        assert (offer["agent_id"], offer["gpu_vram_available_gb"]) == (agent_id, 20.5)

        kind, shown = await ask("capacity.show.v1", {"agent_id": agent_id})
        assert kind == "capacity.agent.v1"
        assert set(shown) == {
            "agent_id",
            "status",
            "timestamp",
            "heartbeat_age_seconds",
            "gpu_vram_max_available_gb",
            "gpu_sample_age_seconds",
            *heartbeat["resources"],
        }
        # Not said by the agent: with one GPU it is what that has free.
        assert shown["gpu_vram_max_available_gb"] == 20.5

        kind, refused = await ask("capacity.show.v1", {"agent_id": str(uuid4())})
        assert (kind, refused["code"]) == ("error.v1", "agent_not_found")
        await connection.close()
