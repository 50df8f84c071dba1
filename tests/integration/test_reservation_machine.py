"""Reservations through random lives, next to a model that a child could check.

Every rule is a step on a real database; after each one what the registry offers and holds must be
what the model says. Some steps are several requests at once: then the model says what must hold of
whatever came out.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import (
    CapacityQuery,
    CapacityReserve,
    Reservation,
    ReservationRelease,
    ReservationRenew,
)
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import CapacityRefused, InsufficientCapacity, StaleFence
from chiffon.registry.registry import Registry
from tests.fixtures.rooms import broken, gpu, record, request, rig
from tests.fixtures.servers import Servers, new_database

TOTAL_GB = 24
CORES = 16
AGENTS = 3

numbers = st.integers(0, AGENTS - 1)
amounts = st.integers(1, TOTAL_GB)


@dataclass
class Agent:
    """An agent as the model has it: GPUs of 24 GiB, of which strangers use some."""

    agent_id: UUID
    gpus: int
    sequence: int = 0
    status: str = "online"
    drained: bool = False
    used: list[int] = field(default_factory=list)


@dataclass
class Held:
    """A reservation as the model has it: what it has on each GPU, and on each agent."""

    made: Reservation
    asked: CapacityReserve
    parts: dict[tuple[UUID, int], int]
    agents: list[UUID]


class Machine(RuleBasedStateMachine):
    """The steps. All tie their processes, so that what is left is exact and not a guess."""

    loop: asyncio.AbstractEventLoop
    registry: Registry
    database: "asyncpg.Connection[asyncpg.Record]"

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @initialize(gpus=st.lists(st.integers(1, 2), min_size=AGENTS, max_size=AGENTS))
    def begin(self, gpus: list[int]) -> None:
        self.agents = [
            Agent(UUID(int=place), count, used=[0] * count) for place, count in enumerate(gpus)
        ]
        self.held: dict[UUID, Held] = {}
        self.over: list[Held] = []
        self.fence = 0
        self.service = ReservationService(self.registry)
        self.do(self.database.execute("TRUNCATE agent_registry, reservation"))
        self.do(self.prove_path())
        for number in range(AGENTS):
            self.speak(number)

    async def prove_path(self) -> None:
        await self.registry.path.mark_fresh(time.monotonic())
        await self.database.execute("UPDATE ingest_path SET fresh_since = now() - interval '1 day'")

    @staticmethod
    def pick(among: list[Held], which: int) -> Held | None:
        """Return one of them, if there is any: what is drawn must not depend on who won a race."""
        return among[which % len(among)] if among else None

    def speak(self, number: int) -> None:
        """Let an agent report: what strangers use is gone, what it holds is used by nobody yet."""
        agent = self.agents[number]
        agent.sequence += 1
        observed = [
            {"reservation_id": str(one.made.reservation_id), "cpu_cores": 0.0, "memory_gb": 0.0}
            for one in self.held.values()
            if agent.agent_id in one.agents
        ]
        said = rig(
            *(
                gpu(index, float(TOTAL_GB - used), TOTAL_GB)
                for index, used in enumerate(agent.used)
            ),
            agent_id=agent.agent_id,
            sequence=agent.sequence,
            status=agent.status,
            resources={"cpu_cores_available": CORES, "observed": observed},
        )
        self.do(record(self.registry, said))

    def left(self, agent: Agent) -> list[int]:
        """Return what the model says can be taken of each GPU."""
        taken = [0] * agent.gpus
        for one in self.held.values():
            for (agent_id, index), amount in one.parts.items():
                if agent_id == agent.agent_id:
                    taken[index] += amount
        return [
            max(TOTAL_GB - used - gone, 0) for used, gone in zip(agent.used, taken, strict=True)
        ]

    def cores_left(self, agent: Agent) -> int:
        return CORES - sum(
            one.asked.cpu_cores for one in self.held.values() if agent.agent_id in one.agents
        )

    def fits(self, agent: Agent, asked: CapacityReserve) -> bool:
        return (
            agent.status == "online"
            and not agent.drained
            and asked.agent_id in (None, agent.agent_id)
            and self.cores_left(agent) >= asked.cpu_cores
            and sum(one >= asked.gpu_vram_gb for one in self.left(agent)) >= asked.gpus
        )

    def note(self, asked: CapacityReserve, made: Reservation) -> None:
        """Take note of what was granted, which must have been there."""
        assert made.fence > self.fence, "fences only grow"
        self.fence = made.fence
        parts = {}
        for place in made.places:
            agent = next(one for one in self.agents if one.agent_id == place.agent_id)
            assert self.fits(agent, asked)
            assert len(place.gpus) == asked.gpus
            for one in place.gpus:
                parts[place.agent_id, one.index] = int(one.vram_gb)
        assert len(made.places) == asked.count
        agents = [place.agent_id for place in made.places]
        self.held[made.reservation_id] = Held(made, asked, parts, agents)

    @rule(
        amount=amounts,
        gpus=st.integers(1, 2),
        count=st.integers(1, 2),
        cores=st.integers(0, 6),
        where=st.none() | numbers,
    )
    def reserve(self, amount: int, gpus: int, count: int, cores: int, where: int | None) -> None:
        named = None if where is None else self.agents[where].agent_id
        asked = request(
            gpu_vram_gb=float(amount),
            gpus=gpus,
            cpu_cores=cores,
            count=1 if named else count,
            agent_id=named,
        )
        can = sum(self.fits(agent, asked) for agent in self.agents)
        if can >= asked.count:
            self.note(asked, self.do(self.service.reserve(asked)))
        else:
            with pytest.raises(InsufficientCapacity, match="no room: 3 agents: "):
                self.do(self.service.reserve(asked))

    @rule(amount=st.integers(4, TOTAL_GB), planners=st.integers(2, 8))
    def reserve_at_once(self, amount: int, planners: int) -> None:
        asked = [request(gpu_vram_gb=float(amount)) for _ in range(planners)]

        async def race() -> list[Any]:
            return await asyncio.gather(
                *(self.service.reserve(one) for one in asked), return_exceptions=True
            )

        outcomes = self.do(race())
        granted = [
            (one, made)
            for one, made in zip(asked, outcomes, strict=True)
            if isinstance(made, Reservation)
        ]
        assert all(isinstance(one, Reservation | InsufficientCapacity) for one in outcomes)
        for one, made in sorted(granted, key=lambda pair: pair[1].fence):
            self.note(one, made)
        if len(granted) < planners:
            assert not any(self.fits(agent, asked[0]) for agent in self.agents)

    @rule(which=st.integers(0, 9))
    def ask_again(self, which: int) -> None:
        one = self.pick(list(self.held.values()), which)
        if one is None:
            return
        assert self.do(self.service.reserve(one.asked)).reservation_id == one.made.reservation_id
        other = one.asked.model_copy(update={"lease_seconds": 61.0})
        with pytest.raises(CapacityRefused, match="idempotency_mismatch"):
            self.do(self.service.reserve(other))

    @rule(which=st.integers(0, 9), times=st.integers(1, 3))
    def release(self, which: int, times: int) -> None:
        one = self.pick(list(self.held.values()), which)
        if one is None:
            return
        asked = ReservationRelease(reservation_id=one.made.reservation_id, fence=one.made.fence)

        async def at_once() -> None:
            await asyncio.gather(*(self.service.release(asked) for _ in range(times)))

        self.do(at_once())
        self.over.append(self.held.pop(one.made.reservation_id))

    @rule(which=st.integers(0, 9))
    def let_one_expire(self, which: int) -> None:
        one = self.pick(list(self.held.values()), which)
        if one is None:
            return
        self.do(
            self.database.execute(
                "UPDATE reservation SET expires_at = now() - interval '1 second'"
                " WHERE reservation_id = $1",
                one.made.reservation_id,
            )
        )

        async def twice_at_once() -> list[list[Reservation]]:
            return list(await asyncio.gather(self.service.expire(), self.service.expire()))

        ended = [each for found in self.do(twice_at_once()) for each in found]
        assert [each.reservation_id for each in ended] == [one.made.reservation_id]
        self.over.append(self.held.pop(one.made.reservation_id))

    @rule(which=st.integers(0, 9))
    def come_late(self, which: int) -> None:
        one = self.pick(self.over, which)
        if one is None:
            return
        with pytest.raises(StaleFence):
            self.do(self.service.renew(ReservationRenew(reservation_id=one.made.reservation_id)))

    @rule(number=numbers, used=st.integers(0, TOTAL_GB), index=st.integers(0, 1))
    def a_stranger_uses(self, number: int, used: int, index: int) -> None:
        agent = self.agents[number]
        free = self.left(agent)[index % agent.gpus] + agent.used[index % agent.gpus]
        # What is reserved is theirs; a stranger who takes it all the same is another story.
        agent.used[index % agent.gpus] = min(used, free)
        self.speak(number)

    @rule(number=numbers, status=st.sampled_from(["online", "busy", "offline"]))
    def report(self, number: int, status: str) -> None:
        self.agents[number].status = status
        self.speak(number)

    @rule(number=numbers)
    def drain(self, number: int) -> None:
        agent = self.agents[number]
        agent.drained = not agent.drained
        change = self.registry.agents.drain if agent.drained else self.registry.agents.undrain
        self.do(change(agent.agent_id))

    @invariant()
    def what_is_offered_is_what_the_model_has(self) -> None:
        if not hasattr(self, "agents"):
            return
        # What is held and has not been reported since counts in full: the same, as nobody uses it.
        query = CapacityQuery(min_cpu_cores=0)
        found = self.do(OrchestratorService(self.registry).find(query))
        offered = {one.agent_id: one for one in found.agents}
        assert set(offered) == {
            one.agent_id for one in self.agents if one.status == "online" and not one.drained
        }
        for agent in self.agents:
            if agent.agent_id in offered:
                offer = offered[agent.agent_id]
                assert offer.gpu_vram_available_gb == sum(self.left(agent))
                assert offer.gpu_vram_max_available_gb == max(self.left(agent))
                assert offer.cpu_cores_available == self.cores_left(agent)
        assert self.do(broken(self.database)) == []


@pytest.fixture
def loop() -> Any:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.mark.parametrize("lives", [12, pytest.param(100, marks=pytest.mark.deep)])
def test_random_lives_of_reservations_are_as_the_model_says(
    servers: Servers, loop: asyncio.AbstractEventLoop, lives: int
) -> None:
    """Many lives, each of some thirty steps in the database."""

    async def live() -> None:
        async with new_database(servers, migrated=True) as url, Registry.open(url) as registry:
            database = await asyncpg.connect(asyncpg_url(url))
            Machine.registry, Machine.database = registry, database
            await asyncio.to_thread(run)
            await database.close()

    class InThisLoop(Machine):
        def do(self, work: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    def run() -> None:
        run_state_machine_as_test(
            InThisLoop,
            settings=settings(
                max_examples=lives,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )

    loop.run_until_complete(live())
