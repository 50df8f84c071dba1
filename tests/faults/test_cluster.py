"""Three RabbitMQ nodes: the leader of the heartbeats' queue is killed and frozen; so are two."""

import asyncio

import pytest

from tests.faults.cluster import ClusterLab
from tests.faults.conftest import Survives

pytestmark = [
    pytest.mark.faults,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.xdist_group("cluster"),
]


async def test_the_leading_node_is_killed(cluster_lab: ClusterLab, survives: Survives) -> None:
    async def fault() -> None:
        leader = await cluster_lab.leader()
        leader.kill()
        before = cluster_lab.beats()
        await asyncio.sleep(8)
        assert cluster_lab.beats() - before > len(cluster_lab.agents), "nothing was confirmed"
        leader.start()

    await survives(cluster_lab, "cluster: leader killed (-9), away for 8 s", fault)


async def test_the_leading_node_is_frozen(cluster_lab: ClusterLab, survives: Survives) -> None:
    async def fault() -> None:
        leader = await cluster_lab.leader()
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
