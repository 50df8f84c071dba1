"""Real processes, tied to reservations: what they use, what they start, and when they end."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from chiffon.contract.messages import Gpu
from chiffon.errors import BadConfiguration
from chiffon.probes.jobs import FOLDER, Jobs, tie
from chiffon.probes.nvidia import NvidiaProbe
from tests.fixtures.nvml import GIB, NOT_AVAILABLE, Card, FakeNvml

# Says when it has 64 MiB and a child with as much, and then keeps one CPU busy.
HUNGRY = """
import subprocess, sys
mine = bytearray(b"x" * 2**26)
child = subprocess.Popen(
    [sys.executable, "-c", "mine = bytearray(b'x' * 2**26); print('ready', flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
while True:
    pass
"""


@pytest.fixture
def job() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", HUNGRY], stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
            yield psutil.Process(started.pid)
        finally:
            with suppress(psutil.NoSuchProcess):
                for one in psutil.Process(started.pid).children():
                    one.kill()
            started.kill()


def test_a_process_and_what_it_started_are_seen(tmp_path: Path, job: psutil.Process) -> None:
    reservation_id = uuid4()
    jobs = Jobs(tmp_path)

    tie(tmp_path, reservation_id, [job.pid])
    [first] = jobs.observe([], {})
    time.sleep(0.5)  # to have something to measure
    [second] = jobs.observe([], {})

    assert first.reservation_id == reservation_id
    assert first.cpu_cores is None, "unknown until there are two readings"
    assert first.memory_gb is not None
    assert 0.125 <= first.memory_gb <= 0.25, "64 MiB each, and Python"
    assert second.cpu_cores is not None
    assert 0.1 < second.cpu_cores < 1.5


def test_a_tie_ends_with_its_processes(tmp_path: Path, job: psutil.Process) -> None:
    reservation_id = uuid4()
    tie(tmp_path, reservation_id, [job.pid])
    for one in (*job.children(), job):
        one.kill()
    psutil.Process(job.pid).wait(10)

    assert Jobs(tmp_path).observe([], {}) == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / str(uuid4())).write_text(f"{os.getppid()} 12345.0\n")

    assert Jobs(tmp_path).observe([], {}) == []


def test_what_is_no_tie_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    (tmp_path / FOLDER / str(uuid4())).write_text("seven\n-1 0\n99999999999999999999 0\n\n")

    assert Jobs(tmp_path).observe([], {}) == []
    assert (tmp_path / FOLDER / "notes.txt").exists()


def test_without_a_folder_nothing_is_tied(tmp_path: Path) -> None:
    assert Jobs(None).observe([], {}) == []
    assert Jobs(tmp_path / "none").observe([], {}) == []


@pytest.mark.parametrize("pid", [2**22 + 1, -1, 10**30])
def test_a_process_that_is_not_there_cannot_be_tied(tmp_path: Path, pid: int) -> None:
    with pytest.raises(BadConfiguration, match="there is no process"):
        tie(tmp_path, uuid4(), [pid])


def test_the_vram_of_its_processes_is_told_by_gpu(tmp_path: Path, job: psutil.Process) -> None:
    [child] = job.children()
    cards = [
        Card(uuid="GPU-1", processes={job.pid: 4 * GIB, child.pid: GIB, 1: 9 * GIB}),
        Card(uuid="GPU-2", processes={1: GIB}),
        Card(uuid="GPU-3", processes={job.pid: NOT_AVAILABLE}),
        Card(uuid="GPU-4", processes=None),
    ]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    sample = NvidiaProbe(tmp_path, FakeNvml(cards), "x86_64").read()
    tie(tmp_path, uuid4(), [job.pid])

    [seen] = Jobs(tmp_path).observe([*sample.gpus, Gpu(index=4, gpu_type="amd")], sample.used)

    assert [(one.uuid, one.index, one.vram_gb) for one in seen.gpus] == [
        ("GPU-1", 0, 5.0),
        ("GPU-3", 2, None),
        ("GPU-4", 3, None),
        (None, 4, None),
    ]
