"""What the gateway costs: each kind of answer beside an empty one, and its CPU with a page open.

    python -m benchmarks.gateway --agents 10000 --speaking 2000

A whole `chiffon up` with that many rows that stand still, and simulated agents that speak.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import asyncpg
import httpx
import psutil

from chiffon.embedded.postgres import asyncpg_url
from chiffon.settings import up_addresses
from tests.fixtures.heartbeats import RESOURCES
from tests.fixtures.up import Running, state_folder

PATHS = (
    "/livez",
    "/api/v1/agents/available-capacity",
    "/api/v1/capacity?min_gpu_vram_gb=30",
    "/api/v1/agents?limit=1000",
    "/api/v1/fleet",
    "/metrics",
)
TRIES = 20
CPU_SECONDS = 10

FILL = """
INSERT INTO agent_registry (agent_id, agent_type, pool_name, status, hostname, last_heartbeat_at,
                            lease_seconds, interval_seconds, resource_metrics)
SELECT gen_random_uuid(), 'desktop', 'pool-' || n % 20, 'online', 'rig-' || n, now(), 1800, 600,
       $2::jsonb
  FROM generate_series(1, $1) AS n
"""


async def fill(url: str, agents: int) -> None:
    """Write rows that stand still."""
    connection = await asyncpg.connect(asyncpg_url(url))
    await connection.execute(FILL, agents, json.dumps(RESOURCES))
    await connection.close()


def answers(client: httpx.Client) -> None:
    """Time each kind of answer, one caller at a time."""
    print(f"{'ANSWER':<40}{'BYTES':>10}{'MEDIAN':>12}{'OF /livez':>12}")
    empty = 0.0
    for path in PATHS:
        seconds = []
        for _ in range(TRIES):
            began = time.monotonic()
            answer = client.get(path)
            seconds.append(time.monotonic() - began)
            assert answer.status_code == 200, answer.text
        median = statistics.median(seconds)
        empty = empty or median
        print(f"{path:<40}{len(answer.content):>10}{median * 1e3:>9.1f} ms{median / empty:>11.0f}x")


def cpu_percent(process: psutil.Process) -> float:
    """Return how busy a process is over the next seconds, in percent of one core."""
    process.cpu_percent()
    time.sleep(CPU_SECONDS)
    return process.cpu_percent()


def follow(client: httpx.Client, received: list[int], stopped: threading.Event) -> None:
    """Be a page that is open."""
    with client.stream("GET", "/stream") as answer:
        for chunk in answer.iter_bytes():
            received.append(len(chunk))
            if stopped.is_set():
                return


def measure(folder: Path, agents: int, speaking: int) -> None:
    """Start everything, and print what the gateway costs."""
    up = Running(folder)
    try:
        up.ready()
        addresses = up_addresses(folder)
        [gateway] = [child for child in up.children() if "gateway" in child.cmdline()]
        asyncio.run(fill(addresses["database_url"], agents))
        client = httpx.Client(base_url=addresses["http_url"], timeout=60, trust_env=False)
        answers(client)
        simulation = subprocess.Popen(
            [
                *(sys.executable, "-m", "chiffon", "simulate", "--agents", str(speaking)),
                *("--seconds", "60", "--silent", "0.05"),
            ],
            env={**os.environ, "CHIFFON_STATE_DIR": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(CPU_SECONDS)
            alone = cpu_percent(gateway)
            received: list[int] = []
            stopped = threading.Event()
            page = threading.Thread(target=follow, args=(client, received, stopped))
            page.start()
            time.sleep(2)
            first = sum(received)
            followed = cpu_percent(gateway)
            stopped.set()
            page.join()
        finally:
            simulation.terminate()
            simulation.wait()
        rate = (sum(received) - first) / CPU_SECONDS
        print(f"CPU of one core, {agents + speaking} agents of which {speaking} speak: ", end="")
        print(f"{alone:.0f} % with no page open, {followed:.0f} % with one")
        print(f"a page gets {first / 1e6:.1f} MB at first, then {rate / 1e3:.0f} KB/s")
    finally:
        up.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--speaking", type=int, default=2_000)
    arguments = parser.parse_args()
    with state_folder() as made:
        measure(made, arguments.agents, arguments.speaking)
