"""A whole system to break: servers of its own, two orchestrators, agents that never stop.

Beside the agents there are ghosts, which said farewell or became silent and must stay dead, and a
planner that asks all the time. What was confirmed is known, so it is known what must be there.
"""

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import aio_pika
import asyncpg

from chiffon import BaseAgent, PlannerClient
from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import declare
from chiffon.amqp.url import hosts
from chiffon.contract.codec import encode, routing_key
from chiffon.contract.messages import CapacityQuery, StatusUpdate
from chiffon.embedded import postgres, rabbitmq
from chiffon.embedded.children import tie_to
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import BusUnavailable, CapacityError
from chiffon.registry import migrations
from tests.faults import audit
from tests.faults.server import Server, end
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.proxy import Proxy
from tests.fixtures.resources import FixedResources
from tests.fixtures.waiting import until

AGENTS = 40
INTERVAL_SECONDS = 0.5
"""So a lease is 5 s, and the silent are marked after 6.7 s."""

LEAST_SHARE = 0.5
"""Of the heartbeats that agents should send: with fewer before a fault it proves nothing."""

QUESTION_SECONDS = 2.0
"""How long the planner waits for an answer."""

PROJECT = Path(__file__).parents[2]
AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class Agent(BaseAgent):
    """An agent that remembers what was confirmed."""

    confirmed: tuple[int, int] | None = None
    beats = 0

    async def _publish(self, sent: StatusUpdate) -> None:
        await super()._publish(sent)
        self.confirmed = sent.order
        self.beats += 1


class Planner:
    """Asks all the time; each question must end in an answer or a clear error, and in time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answered = self.refused = self.late = 0

    async def run(self) -> None:
        """Ask until cancelled."""
        query = CapacityQuery(agent_type=None, min_cpu_cores=0)
        async with PlannerClient.open(self._url) as planner:
            while True:
                asked = time.monotonic()
                try:
                    await planner.find(query, timeout=QUESTION_SECONDS)
                    self.answered += 1
                except (BusUnavailable, CapacityError):
                    self.refused += 1
                if time.monotonic() - asked > QUESTION_SECONDS + 1:
                    self.late += 1
                await asyncio.sleep(0.2)


class Lab:
    """The system under test.

    ``count`` agents, which speak every ``interval_seconds``, are made by ``inhabited``.

    Args:
        amqp_url: The broker, or all nodes of it.
        database_url: The registry.
        brokers: The nodes.
        database: The server of the registry.
        proxy: What the agents speak through.
        logs: Where the orchestrators write.
    """

    def __init__(
        self,
        amqp_url: str,
        database_url: str,
        brokers: Sequence[Server],
        database: Server,
        proxy: Proxy,
        logs: Path,
    ) -> None:
        self.amqp_url, self.database_url = amqp_url, database_url
        self.brokers, self.database, self.proxy = brokers, database, proxy
        self.node: rabbitmq.RabbitMQ | None = None
        self.count, self.interval_seconds = AGENTS, INTERVAL_SECONDS
        self.agents: list[Agent] = []
        self.orchestrators: list[subprocess.Popen[bytes]] = []
        self.dead: list[StatusUpdate] = []
        self._logs = logs
        self.told: Counter[UUID] = Counter()
        """Whom the orchestrators said to have marked offline."""
        self.made: Counter[UUID] = Counter()
        """Whom the database saw marked offline."""
        self._log_ends: dict[Path, int] = {}
        self._numbers = itertools.count()

    @property
    def broker(self) -> Server:
        """The first node."""
        return self.brokers[0]

    def rabbitmqctl(self, *arguments: str) -> None:
        assert self.node is not None
        subprocess.run(
            [str(self.node.program.with_name("rabbitmqctl")), *arguments],
            env=self.node.environment,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def start_orchestrator(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start one more; ``argv`` is what to run instead of ``chiffon orchestrator run``."""
        log = self._logs / f"orchestrator-{next(self._numbers)}.log"
        with log.open("wb") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", *(argv or ("chiffon", "orchestrator", "run"))],
                env={
                    **os.environ,
                    "CHIFFON_AMQP_URL": self.amqp_url,
                    "CHIFFON_DATABASE_URL": self.database_url,
                },
                cwd=PROJECT,
                stdout=output,
                stderr=output,
                preexec_fn=tie_to(os.getpid(), signal.SIGKILL),
            )
        self.orchestrators.append(started)
        return started

    def end(self) -> None:
        """End all orchestrators."""
        for one in self.orchestrators:
            end(one)

    async def changes(self) -> list[audit.Change]:
        """Return what changed since the last call, and count who was marked offline."""
        # The logs first: what they tell is committed, so the audit has it, and not the reverse.
        for path in self._logs.glob("orchestrator-*.log"):
            with path.open("rb") as file:
                file.seek(self._log_ends.get(path, 0))
                content = file.read()
                self._log_ends[path] = file.tell()
            self.told.update(UUID(found.decode()) for found in _TOLD.findall(content))
        found = await audit.take(self.database_url)
        self.made.update(one.agent_id for one in found if one.is_marking)
        return found

    def doubled(self) -> int:
        """Return how many transitions more were told than were made."""
        return sum(max(count - self.made[agent_id], 0) for agent_id, count in self.told.items())

    async def rows(self) -> dict[UUID, Any]:
        connection = await asyncpg.connect(asyncpg_url(self.database_url), timeout=5)
        try:
            found = await connection.fetch(
                "SELECT agent_id, status, incarnation, sequence,"
                " extract(epoch FROM clock_timestamp() - last_heartbeat_at)::float8 AS age"
                " FROM agent_registry"
            )
        finally:
            await connection.close()
        return {row["agent_id"]: row for row in found}

    async def is_whole(self) -> bool:
        """Whether every agent was heard of late, and every orchestrator consumes."""
        try:
            rows = await self.rows()
            consumers = (await plain.depth(await self.living_url(), "chiffon.ingest"))[1]
        except (*AWAY, aio_pika.exceptions.AMQPError, BusUnavailable):
            return False
        return consumers == len(self.orchestrators) and all(
            (row := rows.get(agent.identity.agent_id)) is not None
            and row["status"] == "online"
            and row["age"] < 2 * self.interval_seconds + 0.5
            for agent in self.agents
        )

    async def living_url(self) -> str:
        """Return the URL of a node that answers.

        Raises:
            BusUnavailable: None does.
        """
        for url in hosts(self.amqp_url):
            with suppress(BusUnavailable):
                await (await dial_any(url, "lab looks")).close()
                return url
        raise BusUnavailable("no node answers")

    def beats(self) -> int:
        return sum(agent.beats for agent in self.agents)

    async def runs(self) -> bool:
        """Whether heartbeats come about as often as they should."""
        before, began = self.beats(), time.monotonic()
        await asyncio.sleep(1.0)
        rate = (self.beats() - before) / (time.monotonic() - began)
        return rate > LEAST_SHARE * len(self.agents) / self.interval_seconds

    async def bury(self) -> None:
        """Let two more agents die: one says farewell, one becomes silent."""
        for last_word in ("offline", "online"):
            ghost = update(uuid4(), pool_name="ghosts", interval_seconds=0.5, sequence=1)
            last = ghost.model_copy(update={"sequence": 2, "status": last_word})
            await self._publish([ghost, last])
            self.dead.append(ghost)

    async def haunt(self) -> None:
        """Deliver, late, what those who are dead said before they died."""
        await self._publish(self.dead)

    async def ghosts_rest(self) -> bool:
        """Whether all the dead are known to be."""
        rows = await self.rows()
        return all(
            (row := rows.get(ghost.agent_id)) is not None and row["status"] == "offline"
            for ghost in self.dead
        )

    async def _publish(self, updates: Sequence[StatusUpdate]) -> None:
        async def is_published() -> bool:
            try:
                async with plain.channel(await self.living_url()) as to:
                    for one in updates:
                        key, body = routing_key(one), encode(one)
                        await plain.publish(to, "chiffon.heartbeats", key, body, "status_update.v1")
            except (BusUnavailable, aio_pika.exceptions.AMQPError, OSError):
                return False
            return True

        await until(is_published, "a broker that takes heartbeats")


AnyLab = TypeVar("AnyLab", bound=Lab)

_TOLD = re.compile(rb"agent ([0-9a-f-]{36}) \([^)]*\) is offline:")


@asynccontextmanager
async def inhabited(lab: AnyLab, agents_url: str) -> AsyncIterator[AnyLab]:
    """Make the database's tables, start orchestrators and agents; wait until all are known."""
    async with AsyncExitStack() as stack:
        await migrations.upgrade(lab.database_url)
        await audit.install(lab.database_url)
        connection = await dial_any(lab.amqp_url, "lab declares")
        await declare(connection)
        await connection.close()
        stack.callback(lab.end)
        for _ in range(2):
            lab.start_orchestrator()
        for _ in range(lab.count):
            agent = Agent(
                agents_url, interval_seconds=lab.interval_seconds, resources=FixedResources()
            )
            lab.agents.append(await stack.enter_async_context(agent))
        await until(lab.is_whole, "every agent in the registry", 60)
        yield lab


@asynccontextmanager
async def opened(
    folder: Path, *, count: int = AGENTS, interval_seconds: float = INTERVAL_SECONDS
) -> AsyncIterator[Lab]:
    """Start a system with one broker, whose agents speak through a proxy."""
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(postgres.run(folder))
        node = await stack.enter_async_context(rabbitmq.run(folder, stop_gently=False))
        broker = Server(
            node.child.process.pid,
            [str(node.program)],
            node.environment,
            Path(node.environment["HOME"]),
        )
        database = Server.of(base.child.process.pid)
        proxy = await stack.enter_async_context(Proxy.to(node.amqp_url).running())
        lab = Lab(node.amqp_url, base.url, [broker], database, proxy, folder)
        lab.node = node
        lab.count, lab.interval_seconds = count, interval_seconds
        stack.callback(broker.end)
        stack.callback(database.end)
        yield await stack.enter_async_context(inhabited(lab, proxy.url(node.amqp_url)))


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill one orchestrator without a chance to tidy up."""
    process.kill()
    assert process.wait() == -signal.SIGKILL
