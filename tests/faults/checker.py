"""Injects a fault into a running system, and says what it did."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.faults.lab import Lab, Planner
from tests.fixtures.waiting import until

Fault = Callable[[], Awaitable[None]]


@dataclass
class Report:
    """What one fault did. All but the first and the last three must be 0.

    ``lost``: agents whose newest confirmed heartbeat is not in the registry. ``backward``: steps
    of a row to an older heartbeat. ``false_offlines``: of agents that kept speaking.
    ``resurrections``: of ghosts. ``doubled``: transitions that were made twice. ``late``:
    questions that ended after their deadline. ``outlasted``: agents that the fault kept from
    dialling for longer than their lease, rightly offline. ``reasons``: of all that were marked.
    """

    beats: int = 0
    lost: int = 0
    backward: int = 0
    false_offlines: int = 0
    resurrections: int = 0
    doubled: int = 0
    late: int = 0
    marked: int = 0
    outlasted: int = 0
    answered: int = 0
    refused: int = 0
    recovery_seconds: float = 0.0
    reasons: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing happened that may never be."""
        return not (
            self.lost
            or self.backward
            or self.false_offlines
            or self.resurrections
            or self.doubled
            or self.late
        )


async def suffer(lab: Lab, fault: Fault, *, outlasts_leases: bool = False) -> Report:
    """Let traffic run, inject a fault, heal it, and check what is left.

    Args:
        lab: The system.
        fault: Injects the fault, shows that it happened, and heals it, all before it returns.
        outlasts_leases: Whether an agent that has to dial again then needs longer than its lease:
            it is rightly offline for its silence, too.
    """
    await until(lab.runs, "enough heartbeats before the fault")
    await until(lab.ghosts_rest, "the dead of earlier faults are offline")
    await lab.changes()
    dead = {ghost.agent_id for ghost in lab.dead}
    await lab.haunt()
    await lab.bury()
    report, planner, beats = Report(), Planner(lab.amqp_url), lab.beats()
    asking = asyncio.create_task(planner.run())
    try:
        await fault()
        healed, answered = time.monotonic(), planner.answered

        async def is_well() -> bool:
            return planner.answered > answered and await lab.is_whole()

        await until(is_well, "every agent heard, every orchestrator at work, an answer", 60)
        report.recovery_seconds = round(time.monotonic() - healed, 1)
        await lab.haunt()
        # Long enough for a wrong judgement to be made, had the fault planted one.
        await asyncio.sleep(3.0)
        report.lost = await _lost(lab)
    finally:
        asking.cancel()
        await asyncio.wait({asking})
    living = {agent.identity.agent_id for agent in lab.agents}
    changes = await lab.changes()
    offlines = [one for one in changes if one.is_marking]
    wrong = [one for one in offlines if one.agent_id in living]
    rightly = ("missed",) * outlasts_leases
    report.outlasted = sum(str(one.reason).startswith(rightly) for one in wrong)
    report.false_offlines = len(wrong) - report.outlasted
    report.reasons = sorted({str(one.reason) for one in wrong})
    report.marked = len(offlines) - len(wrong)
    report.backward = sum(one.is_backward for one in changes)
    report.resurrections = sum(one.agent_id in dead and one.became != "offline" for one in changes)
    report.doubled = lab.doubled()
    report.answered, report.refused, report.late = planner.answered, planner.refused, planner.late
    report.beats = lab.beats() - beats
    return report


async def _lost(lab: Lab) -> int:
    """Return how many agents' newest confirmed heartbeat does not come into the registry."""
    confirmed = {agent.identity.agent_id: agent.confirmed for agent in lab.agents}
    missing: list[object] = []

    async def is_there() -> bool:
        rows = await lab.rows()
        missing[:] = [
            agent_id
            for agent_id, order in confirmed.items()
            if order is not None
            and (rows[agent_id]["incarnation"], rows[agent_id]["sequence"]) < order
        ]
        return not missing

    try:
        await until(is_there, "what was confirmed", 10)
    except AssertionError:
        return len(missing)
    return 0
