"""Heartbeats committed a second by one process, beside what a user would write instead.

    python -m benchmarks.ingest --agents 10000

A private RabbitMQ and PostgreSQL, both durable. For each contender the queue is filled with
heartbeats of 10,000 agents with metrics that change; then it starts, alone with the two servers,
and what is committed is counted in the database. All in one run, so that the ratios hold.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aio_pika
import psutil

from benchmarks.stage import Fleet, Stage, cpu_seconds, process, publish, staged, where
from chiffon.contract.topology import HEARTBEATS
from tests.fixtures.waiting import until

COMMITTED = "SELECT sum(sequence)::bigint FROM agent_registry"
LIMIT_SECONDS = 20.0
WARM_SHARE = 0.1
"""Of the messages: until then connections are opened and statements prepared."""


@dataclass(frozen=True)
class Contender:
    """Who is measured.

    ``messages``: how many are in the queue; a slow one is stopped after 20 s.
    """

    name: str
    label: str
    argv: tuple[str, ...]
    messages: int


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.contenders.{name}")


CONTENDERS = (
    Contender(
        "faststream",
        "(a) FastStream, one SQLModel upsert each",
        _module("faststream_sqlmodel"),
        20_000,
    ),
    Contender(
        "aio-pika", "(b) aio-pika, one upsert, one ack each", _module("aio_pika_iterator"), 20_000
    ),
    Contender(
        "celery", "(c) Celery's receiver, one snapshot a second", _module("celery_events"), 40_000
    ),
    Contender(
        "bare", "(d) bare protocol, the same bulk statement", _module("bare_protocol"), 90_000
    ),
    Contender(
        "chiffon",
        "chiffon orchestrator",
        (sys.executable, "-m", "chiffon", "orchestrator", "run"),
        90_000,
    ),
)


@dataclass(frozen=True)
class Figures:
    """What came of it: heartbeats a second, and µs of CPU a heartbeat, by process."""

    rate: float
    own: float
    broker: float
    database: float


async def measure(
    stage: Stage, fleet: Fleet, contender: Contender, scale: float, seconds: float
) -> Figures:
    """Fill the queue, start one contender, and count what it commits."""
    count = int(contender.messages * scale)
    async with stage.database() as database:
        await fleet.add_rows(database)
        await stage.purge()
        if contender.name == "celery":
            messages: Iterator[tuple[str, bytes]] = _celery(fleet)
            exchange = "celeryev"
            await _declare_celery(stage)
        else:
            messages, exchange = fleet.heartbeats(), HEARTBEATS
        await publish(stage.amqp_url, messages, count, exchange=exchange)
        await database.execute("CHECKPOINT")

        async def committed() -> int:
            return int(await database.fetchval(COMMITTED))

        async def warm() -> bool:
            return await committed() >= count * WARM_SHARE

        with process(contender.argv, stage) as running:
            servers = psutil.Process(stage.broker_pid), psutil.Process(stage.database_pid)

            def cpu() -> list[float]:
                return [cpu_seconds(one) for one in (running, *servers)]

            await until(warm, f"{contender.name} commits")
            first, began, before = await committed(), time.monotonic(), cpu()
            while True:
                await asyncio.sleep(0.25)
                done, now, after = await committed(), time.monotonic(), cpu()
                if done >= count * 0.95 or now - began > seconds:
                    break
    each = [(b - a) / (done - first) * 1e6 for a, b in zip(before, after, strict=True)]
    return Figures((done - first) / (now - began), *each)


async def _declare_celery(stage: Stage) -> None:
    async with await aio_pika.connect(stage.amqp_url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("celeryev", "topic", durable=True)
        queue = await channel.declare_queue(
            "celeryev.benchmark",
            durable=True,
            arguments={"x-expires": 60_000, "x-message-ttl": 60_000},
        )
        await queue.bind(exchange, "#")


def _celery(fleet: Fleet) -> Iterator[tuple[str, bytes]]:
    """Yield the same fleet's heartbeats as Celery's workers send them."""
    while True:
        fleet.sequence += 1
        for number in range(len(fleet.agent_ids)):
            body = {
                "type": "worker-heartbeat",
                "hostname": f"rig-{number}",
                "utcoffset": 0,
                "pid": 1,
                "clock": fleet.sequence,
                "timestamp": time.time(),
                "freq": 600.0,
                "active": 0,
                "processed": 0,
                "loadavg": [0.1, 0.1, 0.1],
                "sw_ident": "py-celery",
                "sw_ver": "5.7.0",
                "sw_sys": json.loads(fleet.metrics(0)),
            }
            yield "worker.heartbeat", json.dumps(body).encode()


async def run(
    agents: int,
    names: list[str],
    rounds: int,
    *,
    scale: float = 1.0,
    seconds: float = LIMIT_SECONDS,
) -> None:
    """Measure each contender, and print the figures and their ratios."""
    fleet = Fleet(agents)
    async with staged() as stage:
        print(f"{where(stage)}; {agents} agents", flush=True)
        print(f"{'':<46}{'committed/s':>12}{'own':>8}{'broker':>8}{'database':>10}  µs CPU each")
        best: dict[str, Figures] = {}
        for _ in range(rounds):
            for contender in CONTENDERS:
                if contender.name not in names:
                    continue
                found = await measure(stage, fleet, contender, scale, seconds)
                print(
                    f"{contender.label:<46}{found.rate:>12,.0f}{found.own:>8.1f}"
                    f"{found.broker:>8.1f}{found.database:>10.1f}",
                    flush=True,
                )
                if contender.name not in best or best[contender.name].rate < found.rate:
                    best[contender.name] = found
        ours = best.get("chiffon")
        for contender in CONTENDERS:
            if ours is not None and contender.name in best and contender.name != "chiffon":
                ratio = ours.rate / best[contender.name].rate
                print(f"chiffon beside {contender.label:<46}{ratio:>8.2f} x")


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    given = parser.parse_args()
    asyncio.run(run(given.agents, given.only, given.rounds))


if __name__ == "__main__":
    main()
