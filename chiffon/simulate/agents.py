"""Simulated agents: what each of them says, and what befalls it on the way."""

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

from chiffon import __version__
from chiffon.amqp.publisher import Publisher, publish_heartbeat
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.messages import AgentStatus, StatusUpdate
from chiffon.errors import BusUnavailable
from chiffon.simulate.model import Expected
from chiffon.simulate.profiles import Host, profile_for

JITTER = 0.05
BUSY_SHARE = 0.05
CRASH_SHARE, STAYS_AWAY_SHARE = 0.5, 0.1
"""Of those that leave: without a word and at once back; for good."""

RETRY_SECONDS = 0.2
LAST_WORDS_SECONDS = 30.0
"""For the last heartbeat of an agent to be confirmed."""


@dataclass(frozen=True)
class Plan:
    """What to simulate. Shares are of 1.

    Args:
        agents: How many.
        connections: Over how many connections they speak.
        seconds: How long.
        interval_seconds: Between two heartbeats of one agent.
        loss: Share of heartbeats that never leave their host.
        duplicates: Share that arrive twice.
        reordering: Share that arrive after their successor.
        skew_seconds: How far clocks are off, at most, either way.
        silent: Share of agents that become silent half-way.
        churn: Share of agents that stop and start again, per minute.
        seed: The same seed: the same agents with the same fates.
    """

    agents: int = 100
    connections: int = 1
    seconds: float = 60.0
    interval_seconds: float = 5.0
    loss: float = 0.01
    duplicates: float = 0.01
    reordering: float = 0.02
    skew_seconds: float = 30.0
    silent: float = 0.1
    churn: float = 0.05
    seed: int = 1

    @property
    def pool_name(self) -> str:
        """The pool of its agents, so that they can be distinguished from others."""
        return f"simulated-{self.seed}"


@dataclass(frozen=True)
class Schedule:
    """When things happen; seconds of the loop's clock."""

    begins: float
    silence: float
    ends: float


class Agent:
    """One simulated agent.

    It never loses or delays two heartbeats in a row, so nothing but silence makes it silent.

    Args:
        number: Its number in the fleet.
        plan: What befalls it, and how often.
        shared: The connection that it shares with others.
        tally: Where to count what happened.
        becomes_silent: Whether it is one of those.
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        shared: "SharedConnection",
        tally: Counter[str],
        *,
        becomes_silent: bool,
    ) -> None:
        self._chance = Random(f"{plan.seed}/{number}")
        self.agent_id = agent_id(plan, number)
        self._plan = plan
        self._shared = shared
        self._tally = tally
        self._becomes_silent = becomes_silent
        self._profile = profile_for(self._chance)
        self._hostname = f"{self._profile.name}-{number}"
        self._host = Host(f"{number}", self._profile, self._chance)
        self._skew = self._chance.uniform(-plan.skew_seconds, plan.skew_seconds)
        self.expected = Expected(self.agent_id, self._skew)
        self._incarnation = 0
        self._sequence = itertools.count(1)
        self._last_confirmed = True
        self._was_spared = False
        self._speaking = asyncio.Lock()
        self._later: set[asyncio.Task[None]] = set()

    async def live(self, schedule: Schedule) -> None:
        """Speak until the end, until its silence, or until it leaves for good."""
        ends = schedule.silence if self._becomes_silent else schedule.ends
        self._start()
        earlier = self._compose()
        await _sleep_until(schedule.begins + self._chance.random() * self._plan.interval_seconds)
        leaves_for_good = False
        while (left := ends - _now()) > 0 and not leaves_for_good:
            # What befell it at the very end would still be on its way when all is compared.
            is_last = left < 4 * self._plan.interval_seconds
            await (self._send(self._compose()) if is_last else self._beat())
            # As a real agent does, with a fresh reading as soon as it is connected again.
            await asyncio.sleep(self._pause() if self._last_confirmed else RETRY_SECONDS)
            if not is_last and self._leaves():
                leaves_for_good = await self._leave()
        if self._later:
            await asyncio.wait(self._later)
        if not leaves_for_good:
            await self._say_surely("busy" if self._chance.random() < BUSY_SHARE else "online")
        if self._becomes_silent and not leaves_for_good:
            self.expected.is_silent = True
            self._tally["silent"] += 1
        if self._becomes_silent or leaves_for_good:
            # A heartbeat from before that comes late does not raise the dead.
            await _sleep_until(schedule.ends)
            await self._send(earlier)

    def _start(self) -> None:
        self._incarnation = max(int(time.time() * 1_000), self._incarnation + 1)
        self._sequence = itertools.count(1)

    def _pause(self) -> float:
        return self._plan.interval_seconds * self._chance.uniform(1 - JITTER, 1 + JITTER)

    def _compose(self, status: AgentStatus = "online") -> StatusUpdate:
        return StatusUpdate(
            agent_id=self.agent_id,
            agent_type=self._profile.agent_type,
            pool_name=self._plan.pool_name,
            capabilities=["gpu"] if self._profile.gpus else [],
            status=status,
            hostname=self._hostname,
            agent_version=__version__,
            incarnation=self._incarnation,
            sequence=next(self._sequence),
            sent_at=datetime.now(UTC) + timedelta(seconds=self._skew),
            interval_seconds=self._plan.interval_seconds,
            resources=None if status == "offline" else self._host.read(),
        )

    async def _beat(self) -> None:
        update = self._compose("busy" if self._chance.random() < BUSY_SHARE else "online")
        fate, plan = self._chance.random(), self._plan
        may_be_spared, self._was_spared = not self._was_spared, False
        if may_be_spared and fate < plan.loss:
            self._tally["lost"] += 1
            self._was_spared = True
        elif may_be_spared and fate < plan.loss + plan.reordering:
            self._tally["reordered"] += 1
            self._was_spared = True
            self._send_later(update, self._chance.uniform(1.1, 1.9) * plan.interval_seconds)
        elif fate > 1 - plan.duplicates:
            self._tally["duplicated"] += 1
            await self._send(update)
            self._send_later(update, self._chance.random() * plan.interval_seconds)
        else:
            await self._send(update)

    def _send_later(self, update: StatusUpdate, seconds: float) -> None:
        async def send() -> None:
            await asyncio.sleep(seconds)
            await self._send(update)

        task = asyncio.create_task(send())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def _send(self, update: StatusUpdate) -> bool:
        # One at a time, so that the order of the confirms is that of the queue.
        async with self._speaking:
            self._last_confirmed = await self._shared.publish(update)
            if self._last_confirmed:
                self.expected.confirm(update)
        self._tally["confirmed" if self._last_confirmed else "not confirmed"] += 1
        return self._last_confirmed

    async def _say_surely(self, status: AgentStatus) -> None:
        """Send heartbeats until one is confirmed: what came of one that was not is unknown."""
        gives_up = _now() + LAST_WORDS_SECONDS
        while not await self._send(self._compose(status)):
            if _now() > gives_up:
                raise BusUnavailable(f"no heartbeat confirmed within {LAST_WORDS_SECONDS:g} s")
            await asyncio.sleep(RETRY_SECONDS)

    def _leaves(self) -> bool:
        return self._chance.random() < self._plan.churn * self._plan.interval_seconds / 60

    async def _leave(self) -> bool:
        """Stop, with or without a farewell, and start again; return whether it stays away."""
        self._tally["left"] += 1
        if self._chance.random() < CRASH_SHARE:
            self._start()
            return False
        if not self._last_confirmed:
            await self._say_surely("online")
        await self._say_surely("offline")
        self.expected.farewells += 1
        if self._chance.random() < STAYS_AWAY_SHARE:
            return True
        await asyncio.sleep(self._chance.uniform(1, 3) * self._plan.interval_seconds)
        self._start()
        return False


class SharedConnection:
    """A connection that many simulated agents share.

    Args:
        supervised: The connection.
    """

    def __init__(self, supervised: ReconnectingConnection) -> None:
        self._supervised = supervised
        self._publisher = Publisher(supervised)

    async def publish(self, update: StatusUpdate) -> bool:
        """Publish a heartbeat; returns whether the broker confirmed it."""
        try:
            await publish_heartbeat(self._publisher, update)
        except BusUnavailable:
            return False
        self._supervised.reset_back_off()
        return True


def agent_id(plan: Plan, number: int) -> UUID:
    """Return the id of one agent of a plan."""
    return UUID(int=Random(f"{plan.seed}/{number}/id").getrandbits(128), version=4)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(moment - _now(), 0.0))
