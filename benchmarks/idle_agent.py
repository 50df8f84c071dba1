"""What an idle agent costs beside others that report on a host: start, CPU and memory.

    python -m benchmarks.idle_agent [--seconds 180] [--python PYTHON] [--node-exporter PATH]

The aim at an interval of 5 s: below 0.3 % of one core, below 45 MB. On a broker of their own, one
started after another and then measured together: two agents, one that does not find rich and one
that does, which structlog then loads; Prometheus's node_exporter, if there is one, read every 5 s;
a Celery worker with nothing to do, if that is installed; and a Python that only sleeps. pydantic
looks for plugins in every package that is installed, so measure the install that you mean:
`--python` names the interpreter of one that has nothing but `pip install chiffon`.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import aio_pika
import psutil

from benchmarks.stage import PROJECT
from chiffon.amqp.connection import dial
from chiffon.amqp.declare import declare
from chiffon.embedded import rabbitmq
from chiffon.embedded.children import free_port
from chiffon.logs import configure_for_command
from chiffon.probes.reader import Reader
from tests.fixtures.waiting import until

SETTLE_SECONDS = 10.0
AGENT = "import runpy; runpy.run_module('chiffon.agent', run_name='__main__')"
AGENTS = {
    "agent": f"import sys; sys.modules['rich'] = None; {AGENT}",
    "agent_with_rich": AGENT,
}
CELERY = "from celery.__main__ import main; main()"


@dataclass(frozen=True)
class Program:
    """What is measured: how it is started, and what tells that it does its work."""

    name: str
    argv: Sequence[str]
    environment: dict[str, str]
    works: Callable[[], Awaitable[bool]]


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--interval-seconds", type=float, default=5.0)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument(
        "--node-exporter",
        default=shutil.which("prometheus-node-exporter") or shutil.which("node_exporter"),
    )
    given = parser.parse_args()
    configure_for_command()
    figures = asyncio.run(
        measure(given.python, given.node_exporter, given.seconds, given.interval_seconds)
    )
    print(json.dumps(figures, indent=1))


async def measure(
    python: str, node_exporter: str | None, seconds: float, interval_seconds: float
) -> dict[str, object]:
    """Run the programs for a while and return what each cost."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chiffon-")))
        broker = await stack.enter_async_context(rabbitmq.run(folder / "broker"))
        connection = await dial(broker.amqp_url, name="benchmark")
        await declare(connection)
        await connection.close()
        spoke = await stack.enter_async_context(overhearing(broker.amqp_url))

        def has_spoken(word: str) -> Callable[[], Awaitable[bool]]:
            async def check() -> bool:
                return any(word in one for one in spoke)

            return check

        programs = [
            Program(
                name,
                [python, "-c", code],
                {
                    "CHIFFON_AMQP_URL": broker.amqp_url,
                    "CHIFFON_HEARTBEAT_INTERVAL_SECONDS": str(interval_seconds),
                    "CHIFFON_LOG_LEVEL": "WARNING",
                    "CHIFFON_POOL_NAME": name,
                    "CHIFFON_STATE_DIR": str(folder / name),
                },
                has_spoken(f".{name}."),
            )
            for name, code in AGENTS.items()
        ]
        if node_exporter is not None:
            port = free_port()
            address = f"127.0.0.1:{port}"
            argv = [node_exporter, f"--web.listen-address={address}", "--log.level=error"]
            read = reading(f"http://{address}/metrics")
            programs.append(Program("node_exporter", argv, {}, read))
            scraping = asyncio.create_task(keep_reading(read, interval_seconds))
            stack.callback(scraping.cancel)
        if find_spec("celery") is not None:
            argv = [sys.executable, "-c", CELERY, "-b", broker.amqp_url, "worker"]
            argv += ["--pool", "solo", "--loglevel", "ERROR"]
            programs.append(Program("celery_worker", argv, {}, has_spoken("worker.")))

        async def at_once() -> bool:
            return True

        sleeping = [python, "-c", "import time; time.sleep(3600)"]
        programs.append(Program("sleeping_python", sleeping, {}, at_once))
        processes: dict[str, psutil.Process] = {}
        starts: dict[str, float] = {}
        for one in programs:
            began = time.monotonic()
            processes[one.name] = await stack.enter_async_context(running(one))
            await until(one.works, f"{one.name} at work")
            starts[one.name] = time.monotonic() - began
        print(f"measuring for {seconds:g} s", file=sys.stderr)
        await asyncio.sleep(SETTLE_SECONDS)
        observed = await asyncio.gather(*(observe(one, seconds) for one in processes.values()))
    return {
        **{
            name: {"seconds_to_its_first_word": round(starts[name], 2), **figures}
            for name, figures in zip(processes, observed, strict=True)
        },
        "one_reading_cpu_ms": round(await one_reading() * 1e3, 2),
        "seconds": seconds,
        "interval_seconds": interval_seconds,
    }


@asynccontextmanager
async def overhearing(url: str) -> AsyncIterator[set[str]]:
    """Yield the routing keys of what agents and Celery's workers say, as they come."""
    keys: set[str] = set()
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("chiffon.heartbeats", "#")
        events = await channel.declare_exchange("celeryev", "topic", durable=True)
        await queue.bind(events, "#")

        async def note(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            keys.add(message.routing_key or "")

        await queue.consume(note, no_ack=True)
        yield keys


def reading(url: str) -> Callable[[], Awaitable[bool]]:
    """Return what reads a page, and says whether there was one."""

    def read() -> bool:
        try:
            with urlopen(url, timeout=5) as page:
                return len(page.read()) > 0
        except OSError:
            return False

    return lambda: asyncio.to_thread(read)


async def keep_reading(read: Callable[[], Awaitable[bool]], interval_seconds: float) -> None:
    """Read again and again, as Prometheus does."""
    while True:
        await asyncio.sleep(interval_seconds)
        await read()


@asynccontextmanager
async def running(program: Program) -> AsyncIterator[psutil.Process]:
    """Run a program for as long as the context is open."""
    process = await asyncio.create_subprocess_exec(
        *program.argv,
        env={**os.environ, **program.environment},
        cwd=PROJECT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()


async def observe(process: psutil.Process, seconds: float) -> dict[str, float]:
    """Return a process's share of one core, and the most memory it had, over that time."""
    began, before = time.monotonic(), process.cpu_times()
    most = 0
    while time.monotonic() - began < seconds:
        await asyncio.sleep(1)
        most = max(most, process.memory_info().rss)
    elapsed, after = time.monotonic() - began, process.cpu_times()
    used = after.user + after.system - before.user - before.system
    return {
        "cpu_percent_of_one_core": round(100 * used / elapsed, 3),
        "resident_mb": round(most / 1e6, 1),
    }


async def one_reading(count: int = 200) -> float:
    """Return the CPU seconds of one reading of CPU and memory, as each heartbeat does it."""
    with closing(await Reader.open()) as reader:
        began = time.process_time()
        for _ in range(count):
            reader.read()
        return (time.process_time() - began) / count


if __name__ == "__main__":
    main()
