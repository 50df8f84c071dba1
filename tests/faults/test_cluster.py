"""Three RabbitMQ nodes: the leader of the heartbeats' queue is killed and frozen; so are two."""

import asyncio

import pytest

from chiffon import PlannerClient
from chiffon.errors import BusUnavailable, CapacityError
from tests.faults.cluster import ClusterLab
from tests.faults.conftest import Survives
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]


async def test_the_leading_node_is_killed(cluster_lab: ClusterLab, survives: Survives) -> None:
    async def fault() -> None:
        leader = await cluster_lab.holder("chiffon.ingest")
        leader.kill()
        before = cluster_lab.beats()
        await asyncio.sleep(8)
        assert cluster_lab.beats() - before > len(cluster_lab.agents), "nothing was confirmed"
        leader.start()

    await survives(cluster_lab, "cluster: leader killed (-9), away for 8 s", fault)


async def test_the_node_with_the_questions_is_killed(
    cluster_lab: ClusterLab, survives: Survives
) -> None:
    async def fault() -> None:
        holder = await cluster_lab.holder("chiffon.capacity")
        holder.kill()

        async def is_answered() -> bool:
            async with PlannerClient.open(cluster_lab.amqp_url) as planner:
                try:
                    await planner.find(timeout=2.0)
                except (BusUnavailable, CapacityError):
                    return False
                return True

        try:
            await until(is_answered, "an answer from the nodes that are left", 20)
        finally:
            holder.start()

    await survives(cluster_lab, "cluster: node of the questions killed (-9)", fault)

    async def only_the_usual_queue_is_left() -> bool:
        return await cluster_lab.lacks_queue("chiffon.capacity.standby")

    await until(only_the_usual_queue_is_left, "every responder back on the usual queue")


async def test_the_leading_node_is_frozen(cluster_lab: ClusterLab, survives: Survives) -> None:
    async def fault() -> None:
        leader = await cluster_lab.holder("chiffon.ingest")
        leader.freeze()
        await asyncio.sleep(20)
        assert leader.is_frozen
        leader.thaw()

    await survives(cluster_lab, "cluster: leader frozen for 20 s", fault)


async def test_what_only_a_minority_has_is_not_confirmed(
    cluster_lab: ClusterLab, survives: Survives
) -> None:
    async def fault() -> None:
        frozen = cluster_lab.brokers[1:]
        for one in frozen:
            one.freeze()
        before = cluster_lab.beats()
        await asyncio.sleep(8)
        assert all(one.is_frozen for one in frozen)
        # Those that were on their way when the majority went.
        assert cluster_lab.beats() - before <= len(cluster_lab.agents)
        for one in frozen:
            one.thaw()

    await survives(cluster_lab, "cluster: two of three frozen for 8 s", fault)
