"""Faults that really happen, to real servers and processes, under load.

Each test injects one, shows that it happened, heals it, and then checks what may never be: a
confirmed heartbeat that is lost, a state that goes backward, an agent marked offline that never
stopped speaking.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import asyncpg
import psutil
import pytest

from chiffon.messages import FleetEvent
from chiffon.planner import PlannerClient
from chiffon.registry import asyncpg_url
from chiffon.session import dial
from tests.faults.conftest import REPORTS
from tests.faults.lab import INTERVAL_SECONDS, Lab, suffer
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]


async def survives(
    lab: Lab, name: str, fault: Callable[[], Awaitable[None]], *, cuts_lines: bool = False
) -> None:
    """Check what may never be.

    Args:
        lab: The system.
        name: Of the fault, in the table.
        fault: Injects and heals it.
        cuts_lines: Whether it keeps agents from dialling again within 1.5 s: they are rightly
            offline then, because their connection closed.
    """
    lab.offline.clear()
    report = await suffer(lab, fault)
    if cuts_lines:
        wrong = {agent for agent, reason in lab.offline if reason != "connection closed"}
        report.cut_off, report.false_offlines = report.false_offlines - len(wrong), len(wrong)
    REPORTS[name] = report
    assert report.lost == 0
    assert report.backward == 0
    assert report.false_offlines == 0, report.notes


async def test_the_broker_closes_every_connection(lab: Lab) -> None:
    async def fault() -> None:
        sessions = [agent._link.current for agent in lab.agents]
        await asyncio.to_thread(lab.rabbitmqctl, "close_all_connections", "-p", "chiffon", "a test")

        async def all_lost() -> bool:
            return all(session is not None and session.lost.done() for session in sessions)

        await until(all_lost, "the fault: every connection lost")

    await survives(lab, "every connection closed", fault)


async def test_the_broker_is_killed_and_started_again(lab: Lab) -> None:
    async def fault() -> None:
        lab.broker.kill()
        assert not psutil.pid_exists(lab.broker.pid)
        lab.broker.start()

    await survives(lab, "broker killed (-9), started again", fault)


async def test_the_broker_is_away_for_longer_than_a_lease(lab: Lab) -> None:
    async def fault() -> None:
        lab.broker.kill()
        await asyncio.sleep(10)  # two leases
        assert not psutil.pid_exists(lab.broker.pid)
        lab.broker.start()

    await survives(lab, "broker away for 10 s, two leases", fault)


@pytest.mark.parametrize("seconds", [4, 25])
async def test_the_broker_is_frozen(lab: Lab, seconds: int) -> None:
    """25 s is longer than the AMQP heartbeat's 18: publishes in flight are cancelled by nobody."""

    async def fault() -> None:
        before = lab.beats()
        lab.broker.freeze()
        await asyncio.sleep(seconds)
        assert psutil.Process(lab.broker.pid).status() == psutil.STATUS_STOPPED
        assert lab.beats() - before < len(lab.agents), "heartbeats went on"
        lab.broker.thaw()

    await survives(lab, f"broker frozen for {seconds} s", fault)
    assert all(not agent._task.done() for agent in lab.agents), "a heartbeat loop has died"


async def test_a_memory_alarm_blocks_publishers(lab: Lab) -> None:
    async def fault() -> None:
        await asyncio.to_thread(lab.rabbitmqctl, "set_vm_memory_high_watermark", "0.00001")
        await asyncio.sleep(9)
        blocked = [agent._link.current for agent in lab.agents]
        assert any(session is not None and session.is_blocked for session in blocked)
        await asyncio.to_thread(lab.rabbitmqctl, "set_vm_memory_high_watermark", "0.6")

    await survives(lab, "memory alarm for 9 s", fault)


async def test_an_orchestrator_is_killed_and_another_takes_over(lab: Lab) -> None:
    async def fault() -> None:
        for _ in range(3):
            lab.start_orchestrator()
            oldest = lab.orchestrators.pop(0)
            oldest.kill()
            assert oldest.wait() == -signal.SIGKILL
            await asyncio.sleep(1.5)

    await survives(lab, "orchestrators killed (-9), three times", fault)


async def test_both_orchestrators_are_away_for_longer_than_a_lease(lab: Lab) -> None:
    async def fault() -> None:
        for one in (lab.orchestrators.pop(), lab.orchestrators.pop()):
            one.kill()
            one.wait()
        await asyncio.sleep(10)
        lab.start_orchestrator()
        lab.start_orchestrator()

    await survives(lab, "both orchestrators away for 10 s", fault)


async def test_an_orchestrator_is_frozen_and_wakes_up(lab: Lab) -> None:
    async def fault() -> None:
        for one in lab.orchestrators:
            one.send_signal(signal.SIGSTOP)
        await asyncio.sleep(9)
        for one in lab.orchestrators:
            assert psutil.Process(one.pid).status() == psutil.STATUS_STOPPED
            one.send_signal(signal.SIGCONT)

    await survives(lab, "both orchestrators frozen for 9 s", fault)


async def test_an_orchestrator_is_asked_to_stop_under_load(lab: Lab) -> None:
    async def fault() -> None:
        leaving = lab.orchestrators.pop(0)
        leaving.terminate()
        assert await asyncio.to_thread(leaving.wait, 20) == 0
        lab.start_orchestrator()

    await survives(lab, "orchestrator stopped (TERM)", fault)


async def test_the_databases_connections_are_ended(lab: Lab) -> None:
    async def fault() -> None:
        connection = await asyncpg.connect(asyncpg_url(lab.database_url))
        for _ in range(5):
            ended = await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name = 'chiffon'"
            )
            assert ended > 0
            await asyncio.sleep(0.3)
        await connection.close()

    await survives(lab, "database connections ended, five times", fault)


async def test_the_database_is_killed_and_started_again(lab: Lab) -> None:
    async def fault() -> None:
        lab.database.kill()
        assert not psutil.pid_exists(lab.database.pid)
        await asyncio.sleep(8)
        lab.database.start()

    await survives(lab, "database killed (-9), away for 8 s", fault)


async def test_the_database_is_frozen(lab: Lab) -> None:
    async def fault() -> None:
        process = psutil.Process(lab.database.pid)
        frozen = [process, *process.children(recursive=True)]
        for one in frozen:
            one.suspend()
        await asyncio.sleep(8)
        assert all(one.status() == psutil.STATUS_STOPPED for one in frozen)
        for one in frozen:
            one.resume()

    await survives(lab, "database frozen for 8 s", fault)


async def test_the_registry_is_locked(lab: Lab) -> None:
    async def fault() -> None:
        connection = await asyncpg.connect(asyncpg_url(lab.database_url))
        async with connection.transaction():
            await connection.execute("LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(9)
            waiting = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            assert waiting > 0
        await connection.close()

    await survives(lab, "registry locked for 9 s", fault)


async def test_the_binding_of_heartbeats_is_lost(lab: Lab) -> None:
    async def fault() -> None:
        session = await dial(lab.amqp_url, "unbinds")
        channel = await session.channel(confirms=False)
        await channel.queue_unbind("chiffon.ingest", "chiffon.heartbeats", "heartbeat.#")
        before = lab.beats()
        await asyncio.sleep(8)
        assert lab.beats() - before < len(lab.agents), "heartbeats were still routed"
        await channel.queue_bind("chiffon.ingest", "chiffon.heartbeats", "heartbeat.#")
        await session.close()

    await survives(lab, "binding of heartbeats lost for 8 s", fault)


async def test_the_line_is_slow(lab: Lab) -> None:
    async def fault() -> None:
        before = lab.beats()
        lab.proxy.latency_seconds = 0.2
        await asyncio.sleep(8)
        slow = lab.beats() - before
        assert slow < 8 / INTERVAL_SECONDS * len(lab.agents), "nothing was slower"
        lab.proxy.latency_seconds = 0.0

    await survives(lab, "200 ms of latency, both ways, for 8 s", fault)


async def test_lines_are_reset_in_the_middle_of_frames(lab: Lab) -> None:
    async def fault() -> None:
        lab.proxy.resets_after_bytes = 40
        await asyncio.sleep(3)
        lab.proxy.resets_after_bytes = None
        assert lab.proxy.resets > len(lab.agents)

    await survives(lab, "lines reset mid-frame for 3 s", fault, cuts_lines=True)


async def test_lines_are_open_and_swallow_everything(lab: Lab) -> None:
    """Shorter than a lease: an agent whose heartbeat is not confirmed dials again in time."""

    async def fault() -> None:
        lab.proxy.swallows = True
        await asyncio.sleep(3.5)
        lab.proxy.swallows = False
        assert lab.proxy.swallowed_bytes > 0

    await survives(lab, "half-open lines for 3.5 s", fault, cuts_lines=True)


async def test_all_agents_are_cut_off_for_longer_than_a_lease(lab: Lab) -> None:
    """The path is proven, only the agents are silent: one outage, not forty transitions."""
    async with PlannerClient.open(lab.amqp_url) as planner, planner.watch() as events:
        told: list[FleetEvent] = []

        async def follow() -> None:
            async for event in events:
                if isinstance(event, FleetEvent):
                    told.append(event)

        async def is_told(state: str) -> bool:
            return any(event.state == state for event in told)

        async def is_sound() -> bool:
            return not (await planner.find()).degraded

        async def fault() -> None:
            await until(is_sound, "an answer that is not degraded, before")
            lab.proxy.swallows = True
            await until(lambda: is_told("degraded"), "the outage is told")
            assert not await is_sound()
            await asyncio.sleep(8)  # more than it takes to mark the silent
            lab.proxy.swallows = False

        following = asyncio.create_task(follow())
        try:
            await survives(lab, "every agent cut off for 12 s", fault, cuts_lines=True)
            await until(lambda: is_told("recovered"), "its end is told")
        finally:
            following.cancel()
            await asyncio.wait({following})

    assert [event.state for event in told] == ["degraded", "recovered"]
    assert REPORTS["every agent cut off for 12 s"].cut_off <= 0.55 * len(lab.agents)
