"""What the benchmarks stand on: servers of their own, a fleet's messages, and other processes.

The fleet's numbers are drawn from a seeded generator, so two runs send the same.
"""

import asyncio
import json
import logging
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen
from uuid import UUID

import aio_pika
import asyncpg
import psutil

from chiffon.amqp.connection import dial_any
from chiffon.amqp.declare import ensure
from chiffon.amqp.publisher import Properties
from chiffon.contract.messages import STATUS_UPDATE
from chiffon.contract.topology import HEARTBEATS, INGEST
from chiffon.embedded import postgres, rabbitmq
from chiffon.embedded.children import tie_to
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import BusUnavailable
from chiffon.registry import migrations

PROJECT = Path(__file__).parents[1]
POOLS = 20
START = 1_767_225_600_000
_FLUSH = 500

ADD_ROWS = """
INSERT INTO agent_registry (agent_id, agent_type, pool_name, capabilities, status, hostname,
                            agent_version, incarnation, sequence, last_heartbeat_at,
                            lease_seconds, interval_seconds, resource_metrics)
SELECT id, 'desktop', 'pool-' || (n - 1) % $3, '["gpu"]', 'online', 'rig-' || (n - 1), '0.1.0',
       $4, 0, now(), 1800, 600, metrics::jsonb
  FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS a (id, metrics, n)
"""


@dataclass(frozen=True)
class Stage:
    """Running servers, with chiffon's topology and tables."""

    amqp_url: str
    database_url: str
    management_url: str
    broker_pid: int
    database_pid: int
    folder: str
    node: rabbitmq.RabbitMQ | None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find them."""
        return {
            **os.environ,
            "CHIFFON_AMQP_URL": self.amqp_url,
            "CHIFFON_DATABASE_URL": self.database_url,
            "PYTHONPATH": str(PROJECT),
        }

    @asynccontextmanager
    async def database(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """Open a connection to the database."""
        connection = await asyncpg.connect(asyncpg_url(self.database_url))
        try:
            yield connection
        finally:
            await connection.close()

    async def purge(self, queue: str = INGEST) -> None:
        """Empty a queue."""
        async with await aio_pika.connect(self.amqp_url) as connection:
            channel = await connection.channel()
            await (await channel.get_queue(queue, ensure=False)).purge()

    async def depth(self, queue: str = INGEST) -> int:
        """Return how many messages wait in a queue."""
        async with await aio_pika.connect(self.amqp_url) as connection:
            channel = await connection.channel()
            found = await channel.declare_queue(queue, passive=True)
        return found.declaration_result.message_count or 0


# While a broker starts, the client library says at each try that it is not there yet.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    """Run a broker and a database, both as durable as in production, for this benchmark alone."""
    with tempfile.TemporaryDirectory(prefix="chiffon-benchmark-") as name:
        os.chmod(name, 0o755)  # the database's user must get in
        folder = Path(name)
        async with (
            postgres.run(folder) as database,
            rabbitmq.run(folder, stop_gently=False) as broker,
        ):
            await migrations.upgrade(database.url)
            await ensure(lambda: dial_any(broker.amqp_url, "benchmark declares"))
            stage = Stage(
                broker.amqp_url,
                database.url,
                broker.management_url,
                broker.child.process.pid,
                database.child.process.pid,
                name,
                broker,
            )
            stage.versions.update(await _versions(stage))
            yield stage


async def _versions(stage: Stage) -> dict[str, str]:
    async with stage.database() as connection:
        database = (await connection.fetchval("SHOW server_version")).split()[0]
    async with await aio_pika.connect(stage.amqp_url) as opened:
        transport = opened.transport
        assert transport is not None
        properties = transport.connection.server_properties
    return {
        "RabbitMQ": str(properties["version"]),
        "PostgreSQL": database,
        "Python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
    }


LIBRARIES = ("aio_pika", "aiormq", "asyncpg", "pydantic", "faststream", "sqlmodel", "uvloop")


class Fleet:
    """Agents, and what they say: 500-byte heartbeats with metrics that change.

    Args:
        size: How many agents.
    """

    def __init__(self, size: int) -> None:
        self._random = random.Random(size)
        self.agent_ids = [UUID(int=self._random.getrandbits(128), version=4) for _ in range(size)]
        self.pools = [f"pool-{number % POOLS}" for number in range(size)]
        self.sequence = 0

    def metrics(self, number: int) -> str:
        """Return the next readings of the agent of that number, as JSON."""
        share = self._random.random
        return json.dumps(
            {
                "cpu_percent": round(share() * 100, 1),
                "cpu_cores_physical": 16,
                "cpu_cores_available": int(share() * 16),
                "cpu_load_1min": round(share() * 16, 2),
                "cpu_load_5min": round(share() * 16, 2),
                "memory_percent": round(share() * 100, 1),
                "memory_available_gb": round(share() * 64, 2),
                "gpu_vram_total_gb": 24.0,
                "gpu_vram_available_gb": round(share() * 24, 2),
                "gpu_type": "nvidia",
            }
        )

    async def add_rows(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Replace the registry by these agents, none of which has spoken yet."""
        await connection.execute("TRUNCATE agent_registry")
        for start in range(0, len(self.agent_ids), 50_000):
            ids = self.agent_ids[start : start + 50_000]
            metrics = [self.metrics(start + number) for number in range(len(ids))]
            await connection.execute(ADD_ROWS, ids, metrics, POOLS, START)
        await connection.execute("VACUUM ANALYZE agent_registry")
        self.sequence = 0

    def heartbeats(self) -> Iterator[tuple[str, bytes]]:
        """Yield heartbeats for ever, agent after agent: routing keys and bodies."""
        while True:
            self.sequence += 1
            for number, agent_id in enumerate(self.agent_ids):
                pool = self.pools[number]
                key = f"heartbeat.{pool}.desktop.{agent_id}"
                yield key, self.heartbeat(number, agent_id, pool).encode()

    def heartbeat(self, number: int, agent_id: UUID, pool: str) -> str:
        """Return one heartbeat, as JSON."""
        return (
            f'{{"agent_id":"{agent_id}","agent_type":"desktop","pool_name":"{pool}",'
            f'"capabilities":["gpu"],"status":"online","hostname":"rig-{number}",'
            f'"agent_version":"0.1.0","incarnation":{START},"sequence":{self.sequence},'
            f'"sent_at":"2026-01-01T00:00:00Z","interval_seconds":600.0,'
            f'"resources":{self.metrics(number)}}}'
        )


async def publish(
    url: str,
    messages: Iterator[tuple[str, bytes]],
    count: int,
    *,
    exchange: str = HEARTBEATS,
    kind: str | None = STATUS_UPDATE,
    per_second: float | None = None,
    expiration_ms: int | None = None,
) -> None:
    """Publish so many messages and wait until the broker has confirmed them all."""
    connection = await dial_any(url, "benchmark publishes")
    try:
        channel = await connection.channel()
        properties = Properties(
            message_type=kind,
            content_type="application/json",
            expiration=None if expiration_ms is None else str(expiration_ms),
        )
        began, pending = time.monotonic(), set[asyncio.Future[object]]()
        for number in range(count):
            key, body = next(messages)
            pending.add(
                asyncio.ensure_future(
                    channel.basic_publish(
                        body, exchange=exchange, routing_key=key, properties=properties
                    )
                )
            )
            if len(pending) >= _FLUSH:
                await asyncio.gather(*pending)
                pending.clear()
            if per_second is not None:
                ahead = number / per_second - (time.monotonic() - began)
                if ahead > 0.01:
                    await asyncio.sleep(ahead)
        await asyncio.gather(*pending)
    finally:
        await connection.close()


async def is_open(url: str) -> bool:
    """Return whether somebody takes connections there."""
    try:
        connection = await dial_any(url, "benchmark looks")
    except BusUnavailable:
        return False
    await connection.close()
    return True


@contextmanager
def process(argv: Sequence[str], stage: Stage, **environment: str) -> Iterator[psutil.Process]:
    """Run a program for as long as the context is open; its errors come to our own."""
    parent = os.getpid()
    child = subprocess.Popen(
        argv,
        env={**stage.environment, "CHIFFON_LOG_LEVEL": "WARNING", **environment},
        stdout=subprocess.DEVNULL,
        cwd=PROJECT,
        preexec_fn=tie_to(parent, signal.SIGKILL),
    )
    try:
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def cpu_seconds(one: psutil.Process) -> float:
    """Return the CPU time that a process and its children have used."""
    total = 0.0
    for each in (one, *one.children(recursive=True)):
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p99 and p99.9 of what was measured."""
    ordered = sorted(seconds)
    return tuple(  # type: ignore[return-value]
        ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, 0.99, 0.999)
    )


def where(stage: Stage) -> str:
    """Return two lines for people: on what this was measured, and with which libraries."""
    memory = psutil.virtual_memory().total / 2**30
    machine = [f"{name} {version}" for name, version in stage.versions.items()]
    return (
        ", ".join([*machine, f"{memory:.0f} GiB", _processor(), platform.platform()])
        + "\n"
        + ", ".join(f"{name} {version(name)}" for name in LIBRARIES if find_spec(name))
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def counted(port: int, *names: str) -> float:
    """Return what a process has counted so far, added up; 0 while it does not answer."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[-1]) for line in lines if line.split()[0] in names)
