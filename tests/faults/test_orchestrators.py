"""Orchestrators are killed at the worst moments, frozen and stopped, and planners go away."""

import asyncio
import signal

import psutil
import pytest

from chiffon.contract.codec import encode
from chiffon.contract.messages import CapacityQuery
from tests.faults.conftest import Survives
from tests.faults.lab import Lab, kill
from tests.fixtures import plain
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]


async def test_they_are_killed_and_others_take_over(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        for _ in range(3):
            lab.start_orchestrator()
            kill(lab.orchestrators.pop(0))
            await asyncio.sleep(1.5)

    await survives(lab, "orchestrators killed (-9), three times", fault)


@pytest.mark.essential
@pytest.mark.parametrize("moment", ["before the commit", "between commit and acknowledgement"])
async def test_one_dies_at_the_worst_moment(lab: Lab, survives: Survives, moment: str) -> None:
    async def fault() -> None:
        for _ in range(2):
            dying = lab.start_orchestrator("tests.faults.dying_orchestrator", moment)
            assert await asyncio.to_thread(dying.wait, 60) == -signal.SIGKILL
            lab.orchestrators.remove(dying)

    await survives(lab, f"killed {moment}, twice", fault)


async def test_all_are_away_for_longer_than_a_lease(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        for one in (lab.orchestrators.pop(), lab.orchestrators.pop()):
            kill(one)
        await asyncio.sleep(10)
        lab.start_orchestrator()
        lab.start_orchestrator()

    await survives(lab, "both orchestrators away for 10 s", fault)


async def test_all_are_frozen_and_wake_up(lab: Lab, survives: Survives) -> None:
    """The questions that waited meanwhile are nobody's any more."""

    async def fault() -> None:
        for one in lab.orchestrators:
            one.send_signal(signal.SIGSTOP)
        await asyncio.sleep(9)
        for one in lab.orchestrators:
            assert psutil.Process(one.pid).status() == psutil.STATUS_STOPPED
            one.send_signal(signal.SIGCONT)

    await survives(lab, "both orchestrators frozen for 9 s", fault)


async def test_one_is_asked_to_stop_under_load(lab: Lab, survives: Survives) -> None:
    async def fault() -> None:
        leaving = lab.orchestrators.pop(0)
        leaving.terminate()
        assert await asyncio.to_thread(leaving.wait, 20) == 0
        lab.start_orchestrator()

    await survives(lab, "orchestrator stopped (TERM)", fault)


@pytest.mark.essential
async def test_planners_go_away_before_their_answers_come(lab: Lab, survives: Survives) -> None:
    async def ask_and_go(number: int) -> None:
        async with plain.channel(lab.amqp_url) as channel:
            queue = await channel.declare_queue(exclusive=True)
            await plain.publish(
                channel,
                "chiffon.rpc",
                "capacity",
                encode(CapacityQuery()),
                "capacity.find.v1",
                reply_to=queue.name,
                correlation_id=str(number),
            )

    async def fault() -> None:
        for _ in range(20):
            await asyncio.gather(*(ask_and_go(number) for number in range(5)))

        async def no_question_is_left() -> bool:
            return (await plain.depth(lab.amqp_url, "chiffon.capacity"))[0] == 0

        await until(no_question_is_left, "all questions taken")

    report = await survives(lab, "100 planners gone before their answers", fault)
    assert report.refused == 0, "another planner's question was not answered"
