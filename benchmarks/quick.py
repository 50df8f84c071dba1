"""The main ratios in under two minutes: smaller and shorter than the benchmarks they are from.

    python -m benchmarks.quick

They tell whether something is far off. What ``docs/performance.md`` says is measured by the
benchmarks themselves.
"""

import argparse
import asyncio
from importlib.util import find_spec

from benchmarks import capacity, ingest, sweep


async def run() -> None:
    """Run a little of each benchmark."""
    names = ["aio-pika", "chiffon"]
    if find_spec("faststream") and find_spec("msgspec") and find_spec("uvloop"):
        names = ["faststream", "aio-pika", "bare", "chiffon"]
    print("heartbeats committed by one process:")
    await ingest.run(10_000, names, rounds=1, scale=0.3, seconds=5.0)
    print("\nanswers to a planner:")
    sizes = argparse.Namespace(
        agents=[10_000], seconds=0.7, callers=[1, 32], no_load=True, plans=False
    )
    await capacity.run(sizes)
    print("\nsweeps:")
    await sweep.measure(100_000, with_outages=False)


if __name__ == "__main__":
    asyncio.run(run())
