"""An agent that becomes silent, seen by a whole orchestrator: canary, ingest, sweeper, answers."""

import asyncpg

from chiffon import BaseAgent, PlannerClient
from chiffon.contract.codec import encode, routing_key
from chiffon.contract.messages import CapacityQuery
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until


async def test_the_silent_are_not_offered_and_then_marked_while_who_speaks_stays(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """A lease of 5 s: not offered after it, offline after four thirds of it."""
    silent = update(interval_seconds=0.5)
    async with (
        orchestrating(amqp_url, database_url),
        PlannerClient.open(amqp_url) as planner,
        plain.channel(amqp_url) as to,
        BaseAgent(amqp_url, interval_seconds=0.5) as speaker,
    ):
        await plain.publish(
            to, "chiffon.heartbeats", routing_key(silent), encode(silent), "status_update.v1"
        )
        both = {silent.agent_id, speaker.identity.agent_id}

        async def offered() -> set[object]:
            answer = await planner.find(CapacityQuery(min_cpu_cores=0))
            return {offer.agent_id for offer in answer.agents}

        async def all_offered() -> bool:
            return await offered() == both

        await until(all_offered, "both agents offered")

        async def healthy() -> bool:
            return not (await planner.find()).degraded

        await until(healthy, "an answer that is not degraded: the canary came through")

        async def not_offered() -> bool:
            return await offered() == {speaker.identity.agent_id}

        await until(not_offered, "only who speaks is offered")
        row = await registry.agents.show(silent.agent_id)
        assert row is not None
        assert row.status == "online", "not offered, and not yet marked"

        async def marked() -> bool:
            row = await registry.agents.show(silent.agent_id)
            return row is not None and row.status == "offline"

        await until(marked, "the silent agent offline")
        kept = await registry.agents.show(speaker.identity.agent_id)
        assert kept is not None
        assert kept.status == "online"

        await plain.publish(
            to,
            "chiffon.heartbeats",
            routing_key(silent),
            encode(update(silent.agent_id, sequence=2)),
            "status_update.v1",
        )
        await until(all_offered, "who speaks again is offered again")


async def test_the_canary_writes_one_row_however_many_orchestrators_run(
    amqp_url: str, database_url: str, database: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    async with orchestrating(amqp_url, database_url), orchestrating(amqp_url, database_url):

        async def fresh() -> bool:
            return bool(
                await database.fetchval(
                    "SELECT count(*) = 1 AND bool_and(fresh_at > now() - interval '3 s')"
                    " FROM ingest_path"
                )
            )

        await until(fresh, "a canary of the last seconds")
