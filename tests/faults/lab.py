"""A whole system to break: servers of its own, two orchestrators, and agents that never stop.

The checker knows what was confirmed. Whatever the fault was, afterwards the registry must hold it:
nothing confirmed is lost, nothing goes backward, and nobody that kept speaking was marked offline.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import psutil

from chiffon import migrations
from chiffon.agent import BaseAgent
from chiffon.embedded import postgres, rabbitmq
from chiffon.messages import ResourceMetrics, StatusUpdate
from chiffon.provisioning import declare
from chiffon.registry import asyncpg_url
from chiffon.session import dial
from tests.fixtures.proxy import Proxy
from tests.fixtures.waiting import until

AGENTS = 40
INTERVAL_SECONDS = 0.5
"""So a lease is 5 s, and the silent are marked after 6.7 s."""

PROJECT = Path(__file__).parents[2]
LEAST_RATE = 40.0
"""Confirmed heartbeats a second before a fault: with less the run proves nothing."""


class Server:
    """A server process that can be killed, frozen and started again as it was."""

    def __init__(self, pid: int) -> None:
        process = psutil.Process(pid)
        self._argv, self._environment = process.cmdline(), process.environ()
        self._folder, self._user = process.cwd(), process.uids().effective
        self._group = process.gids().effective
        self.pid = pid
        self._own: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """End it, with all that it started, without a chance to tidy up."""
        process = psutil.Process(self.pid)
        children = process.children(recursive=True)
        for one in (process, *children):
            one.send_signal(signal.SIGKILL)
        if self._own is not None:
            self._own.wait()
        psutil.wait_procs([process, *children], timeout=30)

    def start(self) -> None:
        self._own = subprocess.Popen(
            self._argv,
            env=self._environment,
            cwd=self._folder,
            user=self._user,
            group=self._group,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.pid = self._own.pid

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        if self._own is not None and self._own.poll() is None:
            self._own.kill()
            self._own.wait()


class Agent(BaseAgent):
    """An agent that remembers what was confirmed."""

    confirmed: tuple[int, int] | None = None
    beats = 0

    async def _publish(self, sent: StatusUpdate) -> None:
        await super()._publish(sent)
        self.confirmed = sent.order
        self.beats += 1


class Resources:
    """Readings that cost nothing: this is not about probes."""

    def read(self) -> ResourceMetrics:
        return ResourceMetrics(cpu_cores_available=4, gpu_type="none")

    def close(self) -> None:
        pass


@dataclass
class Report:
    """What one fault did."""

    beats: int = 0
    lost: int = 0
    backward: int = 0
    false_offlines: int = 0
    cut_off: int = 0
    recovery_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class Lab:
    """The system under test."""

    amqp_url: str
    database_url: str
    broker: Server
    database: Server
    node: rabbitmq.RabbitMQ
    proxy: Proxy
    orchestrators: list[subprocess.Popen[bytes]]
    agents: list[Agent]
    logs: Path
    backward: int = 0
    offline: list[tuple[UUID, str | None]] = field(default_factory=list)
    _seen: dict[UUID, tuple[int, int]] = field(default_factory=dict)

    def rabbitmqctl(self, *arguments: str) -> None:
        subprocess.run(
            [str(self.node.program.with_name("rabbitmqctl")), *arguments],
            env=self.node.environment,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def start_orchestrator(self) -> subprocess.Popen[bytes]:
        with (self.logs / f"orchestrator-{time.monotonic():.3f}.log").open("wb") as output:
            started = subprocess.Popen(
                [sys.executable, "-m", "chiffon", "orchestrator", "run"],
                env={
                    **os.environ,
                    "CHIFFON_AMQP_URL": self.amqp_url,
                    "CHIFFON_DATABASE_URL": self.database_url,
                },
                cwd=PROJECT,
                stdout=output,
                stderr=output,
            )
        self.orchestrators.append(started)
        return started

    async def rows(self) -> dict[UUID, Any]:
        connection = await asyncpg.connect(asyncpg_url(self.database_url), timeout=5)
        try:
            found = await connection.fetch(
                "SELECT agent_id, status, status_reason, incarnation, sequence,"
                " extract(epoch FROM clock_timestamp() - last_heartbeat_at)::float8 AS age"
                " FROM agent_registry"
            )
        finally:
            await connection.close()
        return {row["agent_id"]: row for row in found}

    async def look(self) -> dict[UUID, Any]:
        """Look at the registry once, and note what must never be."""
        rows = await self.rows()
        for agent_id, row in rows.items():
            order = (row["incarnation"], row["sequence"])
            if order < self._seen.get(agent_id, (0, 0)):
                self.backward += 1
            self._seen[agent_id] = order
            if row["status"] == "offline" and row["status_reason"] != "farewell":
                self.offline.append((agent_id, row["status_reason"]))
        return rows

    async def watch(self) -> None:
        """Look five times a second, as long as the database lets us."""
        while True:
            with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await self.look()
            await asyncio.sleep(0.2)

    async def all_fresh(self) -> bool:
        """Whether the registry has a heartbeat of the last 1.5 s from every agent."""
        try:
            rows = await self.rows()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return len(rows) == len(self.agents) and all(
            row["status"] == "online" and row["age"] < 1.5 for row in rows.values()
        )

    def beats(self) -> int:
        return sum(agent.beats for agent in self.agents)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Lab]:
    """Start everything, and wait until every agent is in the registry."""
    async with AsyncExitStack() as stack:
        base = await stack.enter_async_context(postgres.run(folder))
        node = await stack.enter_async_context(rabbitmq.run(folder, stop_gently=False))
        await migrations.upgrade(base.url)
        session = await dial(node.amqp_url, "lab declares")
        await declare(session)
        await session.close()
        lab = Lab(
            node.amqp_url,
            base.url,
            Server(node.child.process.pid),
            Server(base.child.process.pid),
            node,
            await stack.enter_async_context(_proxy_to(node.amqp_url).running()),
            [],
            [],
            folder,
        )
        through = lab.proxy.url(node.amqp_url)
        stack.callback(lab.broker.end)
        stack.callback(lab.database.end)
        for _ in range(2):
            lab.start_orchestrator()
        stack.callback(_end, lab)
        for _ in range(AGENTS):
            agent = Agent(through, interval_seconds=INTERVAL_SECONDS, resources=Resources())
            lab.agents.append(await stack.enter_async_context(agent))
        await until(lab.all_fresh, "every agent in the registry", 60)
        yield lab


def _proxy_to(url: str) -> Proxy:
    parts = urlsplit(url)
    return Proxy(parts.hostname or "", parts.port or 0)


def _end(lab: Lab) -> None:
    for one in lab.orchestrators:
        if one.poll() is None:
            one.send_signal(signal.SIGCONT)
            one.kill()
            one.wait()


async def suffer(lab: Lab, fault: Callable[[], Any], *, seconds_before: float = 2.0) -> Report:
    """Let traffic run, inject a fault, heal it, and check what is left.

    Args:
        lab: The system.
        fault: Injects the fault, shows that it happened, and heals it, all before it returns.
        seconds_before: Of traffic.
    """
    report = Report()
    watching = asyncio.create_task(lab.watch())
    try:

        async def traffic_runs() -> bool:
            before, began = lab.beats(), time.monotonic()
            await asyncio.sleep(seconds_before)
            return (lab.beats() - before) / (time.monotonic() - began) > LEAST_RATE

        await until(traffic_runs, f"{LEAST_RATE:g} heartbeats a second before the fault")
        await fault()
        healed = time.monotonic()
        await until(lab.all_fresh, "every agent fresh in the registry again", 60)
        report.recovery_seconds = round(time.monotonic() - healed, 1)
        # Long enough for a wrong judgement to be made, had the fault planted one.
        await asyncio.sleep(4.0)
        confirmed = {agent.identity.agent_id: agent.confirmed for agent in lab.agents}

        async def is_in_the_registry() -> bool:
            rows = await lab.rows()
            return all(
                (rows[agent_id]["incarnation"], rows[agent_id]["sequence"]) >= order
                for agent_id, order in confirmed.items()
                if order is not None
            )

        try:
            await until(is_in_the_registry, "what was confirmed", 10)
        except AssertionError:
            rows = await lab.rows()
            report.lost = sum(
                (rows[agent_id]["incarnation"], rows[agent_id]["sequence"]) < order
                for agent_id, order in confirmed.items()
                if order is not None
            )
        await lab.look()
    finally:
        watching.cancel()
        await asyncio.wait({watching})
    report.beats = lab.beats()
    report.backward = lab.backward
    report.false_offlines = len(set(lab.offline))
    report.notes = sorted({str(reason) for _, reason in lab.offline})
    return report
