"""What an idle agent costs: CPU and memory of the agent process, on a broker of its own.

    .venv/bin/python -m benchmarks.idle_agent [--seconds 180] [--python PYTHON]

The aim at an interval of 5 s: below 0.3 % of one core, below 45 MB. Two agents run side by side:
one that does not find rich, one that does, which structlog then loads. For reference stand beside
them, from the same run, a Python that only sleeps, and the CPU time of one reading of CPU and
memory. pydantic looks for plugins in every package that is installed, so measure the install that
you mean: `--python` names the interpreter of one that has nothing but `pip install chiffon`.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import psutil

from chiffon.embedded import rabbitmq
from chiffon.logs import configure_for_command
from chiffon.probes.reader import Reader
from chiffon.provisioning import declare
from chiffon.session import dial

SETTLE_SECONDS = 10.0
AGENT = "import runpy; runpy.run_module('chiffon.agent', run_name='__main__')"
PROGRAMS = {
    "agent": f"import sys; sys.modules['rich'] = None; {AGENT}",
    "agent_with_rich": AGENT,
    "sleeping_python": "import time; time.sleep(3600)",
}


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--interval-seconds", type=float, default=5.0)
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    configure_for_command()
    figures = asyncio.run(measure(given.python, given.seconds, given.interval_seconds))
    print(json.dumps(figures, indent=1))


async def measure(python: str, seconds: float, interval_seconds: float) -> dict[str, object]:
    """Run the programs for a while and return what each cost."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chiffon-")))
        broker = await stack.enter_async_context(rabbitmq.run(folder / "broker"))
        session = await dial(broker.amqp_url, name="benchmark")
        await declare(session)
        await session.close()
        variables = {
            "CHIFFON_AMQP_URL": broker.amqp_url,
            "CHIFFON_HEARTBEAT_INTERVAL_SECONDS": str(interval_seconds),
            "CHIFFON_LOG_LEVEL": "WARNING",
        }
        processes = {
            name: await stack.enter_async_context(
                running(python, code, {**variables, "CHIFFON_STATE_DIR": str(folder / name)})
            )
            for name, code in PROGRAMS.items()
        }
        print(f"measuring for {seconds:g} s", file=sys.stderr)
        await asyncio.sleep(SETTLE_SECONDS)
        observed = await asyncio.gather(*(observe(one, seconds) for one in processes.values()))
    return {
        **dict(zip(processes, observed, strict=True)),
        "one_reading_cpu_ms": round(await one_reading() * 1e3, 2),
        "seconds": seconds,
        "interval_seconds": interval_seconds,
    }


@asynccontextmanager
async def running(
    python: str, code: str, variables: dict[str, str]
) -> AsyncIterator[psutil.Process]:
    """Run a Python program for as long as the context is open."""
    process = await asyncio.create_subprocess_exec(
        python, "-c", code, env={**os.environ, **variables}
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
