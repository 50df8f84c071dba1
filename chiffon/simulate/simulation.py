"""A fleet of simulated agents against a real broker, and whether the registry tells the truth.

Heartbeats are lost, duplicated and reordered, clocks are off, agents become silent, stop and start
again. A model says what the registry must hold at the end and what planners must be offered; the
outcome names every difference.
"""

import asyncio
import gc
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.lease import OUTAGE_FEWEST, lease_for, offline_after
from chiffon.contract.messages import AgentEvent, CapacityQuery
from chiffon.errors import BadConfiguration, ChiffonError
from chiffon.planner.client import PlannerClient
from chiffon.planner.events import Event
from chiffon.registry.registry import Registry
from chiffon.settings import Settings
from chiffon.simulate.agents import Agent, Plan, Schedule, SharedConnection, agent_id
from chiffon.simulate.model import Difference, missed_events, of_events, of_offers, of_rows

log = logging.getLogger(__name__)

__all__ = ["Outcome", "Plan", "run"]

PROGRESS_SECONDS = 5.0
MARGIN_SECONDS = 5.0
"""For the sweep to mark the last of the silent."""

LEFTOVER_LOOKS = 3
"""How often, a second apart, the registry is cleared of what the queue still held."""

QUESTIONS: Sequence[dict[str, Any]] = (
    {},
    {"agent_type": "desktop"},
    {"agent_type": "research", "min_gpu_vram_gb": 40.0},
    {"min_single_gpu_vram_gb": 40.0},
    {"min_cpu_cores": 24, "min_memory_gb": 64.0},
    {"gpu_type": "amd", "min_gpu_vram_gb": 8.0, "limit": 5},
    {"gpu_type": "none"},
    {"capabilities": ["gpu"], "min_gpu_vram_gb": 1_000.0},
)


@dataclass
class Outcome:
    """What was simulated, what happened to it, and what was found.

    ``counts`` are numbers of heartbeats and of agents; ``missed_events`` were not seen here, which
    is no difference: events are hints.
    """

    plan: Plan
    counts: dict[str, int]
    heartbeats_per_second: float
    rows: int
    questions: int
    offers: int
    missed_events: int
    is_outage: bool
    queue_delay_seconds: float | None
    differences: list[Difference] = field(default_factory=list)


async def run(settings: Settings, plan: Plan, tell: Callable[[str], None]) -> Outcome:
    """Simulate, compare, and remove the simulated agents from the registry again.

    Args:
        settings: Where broker and registry are. An orchestrator must be running on them.
        plan: What to simulate.
        tell: Is given a line for people now and then.

    Raises:
        BadConfiguration: The plan is too short to see its silent agents marked, or its pool has
            other agents.
        NoResponders: No orchestrator answers.
        BusUnavailable: The broker cannot be reached.
        RegistryUnavailable: The database cannot be reached.
    """
    lease = lease_for(plan.interval_seconds)
    shortest = 2 * (offline_after(lease) + MARGIN_SECONDS)
    if not shortest <= plan.seconds < math.inf:
        raise BadConfiguration(
            f"{plan.seconds:g} s are too short: agents that stop half-way are marked after "
            f"{offline_after(lease):g} s; give it {shortest:.0f} s or more"
        )
    amqp_url = settings.amqp_url.get_secret_value()
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(
            Registry.open(settings.database_url.get_secret_value())
        )
        planner = await stack.enter_async_context(
            PlannerClient.open(amqp_url, name="chiffon simulate")
        )
        await planner.find(CapacityQuery(limit=1))
        await _clear(registry, plan)
        await _require_own_pool(registry, plan)
        stack.push_async_callback(_clear_for_good, registry, plan)
        tally: Counter[str] = Counter()
        shared = [
            SharedConnection(
                await stack.enter_async_context(
                    ReconnectingConnection(amqp_url, name=f"chiffon simulate {number}")
                )
            )
            for number in range(plan.connections)
        ]
        fleet = _fleet(plan, shared, tally)
        offlines: Counter[UUID] = Counter()
        events = await stack.enter_async_context(planner.watch())
        stack.enter_context(_running(_count_offlines(events, offlines)))
        with _running(_tell(tally, tell)), _no_collections():
            seconds = await _live(fleet, plan)
        tell("comparing")
        looks = _Looks(plan, fleet, registry, planner, offlines, settings.outage_share)
        outcome = await looks.until_alike(lease / 2)
        outcome.counts = dict(sorted(tally.items()))
        outcome.heartbeats_per_second = round(tally["confirmed"] / seconds, 1)
        return outcome


def _fleet(plan: Plan, shared: Sequence[SharedConnection], tally: Counter[str]) -> list[Agent]:
    chance = random.Random(f"{plan.seed}/silent")
    silent = set(chance.sample(range(plan.agents), round(plan.silent * plan.agents)))
    return [
        Agent(number, plan, shared[number % len(shared)], tally, becomes_silent=number in silent)
        for number in range(plan.agents)
    ]


async def _live(fleet: Sequence[Agent], plan: Plan) -> float:
    """Let them all live; return how many seconds it took."""
    begins = asyncio.get_running_loop().time()
    schedule = Schedule(begins, begins + plan.seconds / 2, begins + plan.seconds)
    await asyncio.gather(*(agent.live(schedule) for agent in fleet))
    return asyncio.get_running_loop().time() - begins


async def _count_offlines(events: AsyncIterator[Event], offlines: Counter[UUID]) -> None:
    async for event in events:
        if isinstance(event, AgentEvent) and event.status == "offline":
            offlines[event.agent_id] += 1


async def _tell(tally: Counter[str], tell: Callable[[str], None]) -> None:
    began = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        seconds = asyncio.get_running_loop().time() - began
        said = ", ".join(f"{count} {what}" for what, count in sorted(tally.items()))
        tell(f"{seconds:.0f} s: {said}")


@dataclass
class _Looks:
    """Compares what is there with what must be."""

    plan: Plan
    fleet: Sequence[Agent]
    registry: Registry
    planner: PlannerClient
    offlines: Counter[UUID]
    outage_share: float

    async def until_alike(self, seconds: float) -> Outcome:
        """Look until there is no difference, for so many seconds at most: agents have leases."""
        now = asyncio.get_running_loop().time
        gives_up = now() + seconds
        while True:
            outcome = await self._look()
            if not outcome.differences or now() > gives_up:
                return outcome
            await asyncio.sleep(0.2)

    async def _look(self) -> Outcome:
        expected = [agent.expected for agent in self.fleet]
        silent = sum(one.is_silent for one in expected)
        members = sum(one.newest is not None and not one.newest.is_farewell for one in expected)
        is_outage = silent > max(OUTAGE_FEWEST, self.outage_share * members)
        differences = list(of_events(expected, self.offlines, is_outage=is_outage))
        offered = 0
        for needs in QUESTIONS:
            query = CapacityQuery.model_validate(
                {"agent_type": None, "limit": 1_000, "pool_name": self.plan.pool_name, **needs}
            )
            offers = await self.planner.find(query)
            differences += of_offers(expected, query, offers, is_outage=is_outage)
            offered += len(offers.agents)
        rows = await self.registry.agents.list(pool_name=self.plan.pool_name)
        differences += of_rows(expected, rows, is_outage=is_outage)
        return Outcome(
            plan=self.plan,
            counts={},
            heartbeats_per_second=0.0,
            rows=len(rows),
            questions=len(QUESTIONS),
            offers=offered,
            missed_events=missed_events(expected, self.offlines, is_outage=is_outage),
            is_outage=is_outage,
            queue_delay_seconds=rows[0].queue_delay_seconds if rows else None,
            differences=differences,
        )


async def _clear(registry: Registry, plan: Plan) -> int:
    """Remove what an earlier run with this seed left behind; return how many agents."""
    forgotten = await registry.agents.forget(
        [agent_id(plan, number) for number in range(plan.agents)]
    )
    return len(forgotten)


async def _require_own_pool(registry: Registry, plan: Plan) -> None:
    others = await registry.agents.list(pool_name=plan.pool_name)
    if others:
        raise BadConfiguration(
            f"pool {plan.pool_name} has {len(others)} agents of somebody else, or of a larger "
            "simulation that was killed: take another seed, or `chiffon fleet forget` them"
        )


async def _clear_for_good(registry: Registry, plan: Plan) -> None:
    """Remove the simulated agents; what is still in the queue may bring some back once."""
    try:
        for _ in range(LEFTOVER_LOOKS):
            await _clear(registry, plan)
            await asyncio.sleep(1.0)
        await _clear(registry, plan)
    except ChiffonError as error:
        log.warning("simulated agents are left in pool %s: %s", plan.pool_name, error)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the garbage collector from going through all agents again and again.

    With 10,000 of them it took 60 % of the time, in pauses of half a second. What it would free
    are the traces of errors: little, in a process that ends with its simulation.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _running(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Have a task run for as long as the context is open."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
