"""The main ratios in under a minute: smaller and shorter than the benchmarks they are from.

    python -m benchmarks.quick

They tell whether something is far off. What ``docs/performance.md`` says is measured by the
benchmarks themselves.
"""

import asyncio
from importlib.util import find_spec

from benchmarks import capacity, ingest, sweep
from benchmarks.stage import staged


async def run() -> None:
    """Run a little of each benchmark."""
    names = ["aio-pika", "chiffon"]
    if find_spec("faststream") and find_spec("msgspec") and find_spec("uvloop"):
        names = ["faststream", "aio-pika", "bare", "chiffon"]
    print("heartbeats committed by one process:")
    await ingest.run(10_000, names, rounds=1, scale=0.3, seconds=3.0)
    print("\nanswers to a planner:")
    async with staged() as stage:
        await capacity.measure(stage, 10_000, 0.4, [1, 32], ["alone"])
    print("\nsweeps:")
    await sweep.measure(100_000, with_outages=False)


if __name__ == "__main__":
    asyncio.run(run())
