"""The probe inside a real control group, where the machine lets a test make one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

GIB = 2**30
V1_CPU, V1_MEMORY = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")

PROGRAM = """
import asyncio, json
from chiffon.probes.cgroup import cpu_quotas
from chiffon.probes.reader import Reader

async def main():
    reader = await Reader.open(sources={})
    resources = reader.read().model_dump()
    reader.close()
    quotas = [quota.cpus for quota in cpu_quotas()]
    print(json.dumps([quotas, resources, {one.name: one.source for one in reader.readings}]))

asyncio.run(main())
"""


@contextmanager
def groups() -> Iterator[list[Path]]:
    """Make groups with a quota of 1.5 CPUs and 1 GiB of memory; skips where that is not allowed."""
    name = f"chiffon-test-{uuid4().hex[:8]}"
    made: list[Path] = []
    try:
        if (V1_CPU / "cpu.cfs_quota_us").exists() or (V1_CPU / "cgroup.procs").exists():
            limits = {
                V1_CPU / name: {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"},
                V1_MEMORY / name: {"memory.limit_in_bytes": str(GIB)},
            }
        else:
            (V2 / "cgroup.subtree_control").write_text("+cpu +memory")
            limits = {V2 / name: {"cpu.max": "150000 100000", "memory.max": str(GIB)}}
        for folder, files in limits.items():
            folder.mkdir()
            made.append(folder)
            for file, content in files.items():
                (folder / file).write_text(content)
    except OSError as error:
        for folder in made:
            folder.rmdir()
        pytest.skip(f"this machine does not let a test make control groups: {error}")
    try:
        yield made
    finally:
        for folder in made:
            folder.rmdir()


def test_inside_a_group_its_limits_are_what_the_probe_sees() -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("1.5 CPUs are no limit on a machine with one")
    with groups() as made:

        def enter() -> None:
            for folder in made:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            preexec_fn=enter,
            capture_output=True,
            text=True,
            check=True,
        )

    quotas, resources, sources = json.loads(done.stdout)
    assert 1.5 in quotas
    assert resources["cpu_cores_available"] <= 1
    assert 0.5 < resources["memory_available_gb"] < 1.0
    assert 0 < resources["memory_percent"] < 50
    assert "chiffon-test-" in sources["memory_available_gb"]
