"""All probes together: drivers that hang or fail cost only themselves."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from chiffon.contract.messages import Gpu, ResourceMetrics
from chiffon.probes import reader, sampler
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.operator import OperatorWord
from chiffon.probes.reader import Reader
from chiffon.probes.sample import GpuSample
from tests.fixtures.nvml import Card, FakeNvml
from tests.fixtures.trees import plant
from tests.fixtures.waiting import until

CARD = Gpu(index=0, vram_total_gb=24.0, vram_available_gb=20.0)


@asynccontextmanager
async def reading(
    interval_seconds: float = 5.0,
    word: OperatorWord | None = None,
    **sources: Callable[[], GpuSample],
) -> AsyncIterator[Reader]:
    opened = await Reader.open(interval_seconds, word or OperatorWord(), sources)
    with closing(opened):
        yield opened


async def test_the_first_reading_has_everything() -> None:
    async with reading(amd=lambda: GpuSample("amd", [CARD])) as opened:
        metrics = opened.read()

    assert metrics.cpu_percent is not None
    assert metrics.cpu_cores_available is not None
    assert metrics.memory_available_gb is not None
    assert (metrics.gpu_type, metrics.gpu_vram_available_gb) == ("amd", 20.0)
    assert metrics.probe_errors == []
    assert metrics.gpu_sample_age_seconds is not None
    assert {one.name for one in opened.readings} <= set(ResourceMetrics.model_fields)


async def test_a_source_with_a_bug_costs_only_itself() -> None:
    def buggy() -> GpuSample:
        raise ZeroDivisionError("oops")

    async with reading(nvidia=buggy, amd=lambda: GpuSample("amd", [CARD])) as opened:
        metrics = opened.read()

    assert (metrics.gpu_type, metrics.gpu_vram_available_gb) == ("amd", 20.0)
    assert metrics.probe_errors == ["nvidia: ZeroDivisionError: oops"]


class Counting:
    """A driver that says how often it was asked."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self) -> GpuSample:
        self.taken += 1
        return GpuSample("amd", [CARD])

    async def until(self, taken: int) -> None:
        async def enough() -> bool:
            return self.taken >= taken

        await until(enough, f"{taken} samples")


async def test_samples_go_on_while_nobody_reads_so_that_the_next_reading_is_of_the_present() -> (
    None
):
    driver = Counting()
    async with reading(0.5, amd=driver) as opened:
        await driver.until(4)
        age = opened.read().gpu_sample_age_seconds

    assert age is not None
    assert age < 5


async def test_readings_out_of_turn_do_not_put_off_samples_for_ever() -> None:
    driver = Counting()
    async with reading(0.5, amd=driver) as opened:

        async def read_often() -> bool:
            opened.read()
            return driver.taken >= 3

        await until(read_often, "three samples")


@pytest.fixture
def nvml(tmp_path: Path) -> FakeNvml:
    plant(tmp_path, "nvidia-one")
    return FakeNvml([Card()])


async def test_a_driver_that_hangs_does_not_hold_up_readings_and_its_numbers_grow_old(
    tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reading(0.5, nvidia=NvidiaProbe(tmp_path, nvml).read) as opened:
        assert opened.read().gpu_vram_available_gb == 20.0
        nvml.hangs.set()
        hanging = opened._samplers[0]

        async def hangs() -> bool:
            return hanging._asked is not None

        await until(hangs, "the next sample was asked for")
        recent = opened.read()
        monkeypatch.setattr(sampler, "HUNG_SECONDS", 0.0)
        old = opened.read()
        nvml.hangs.clear()
        nvml.freed.set()

        async def answered() -> bool:
            return opened.read().gpu_vram_available_gb == 20.0

        await until(answered, "the driver answered again")

    assert recent.gpu_vram_available_gb == 20.0
    assert recent.gpu_sample_age_seconds is not None
    assert recent.gpu_sample_age_seconds > 0.1
    assert (old.gpu_type, old.gpu_vram_total_gb) == ("nvidia", 24.0)
    assert (old.gpu_vram_available_gb, old.gpu_vram_max_available_gb) == (None, None)
    assert old.gpu_sample_age_seconds is not None
    assert old.gpu_sample_age_seconds >= recent.gpu_sample_age_seconds
    assert "what is free is unknown" in old.probe_errors[0]


async def test_a_driver_that_hangs_from_the_start_is_unknown_and_not_none(
    tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "FIRST_GPU_SAMPLE_SECONDS", 0.05)
    nvml.hangs.set()
    try:
        async with reading(nvidia=NvidiaProbe(tmp_path, nvml).read) as opened:
            metrics = opened.read()
    finally:
        nvml.freed.set()

    assert (metrics.gpu_type, metrics.gpu_vram_total_gb) == ("nvidia", None)
    assert metrics.gpu_sample_age_seconds is None
    assert metrics.probe_errors[0].startswith("nvidia: no answer yet")


async def test_one_driver_that_hangs_does_not_hide_the_cards_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "FIRST_GPU_SAMPLE_SECONDS", 0.05)
    freed = threading.Event()

    def hanging() -> GpuSample:
        freed.wait()
        return GpuSample("nvidia")

    try:
        async with reading(nvidia=hanging, amd=lambda: GpuSample("amd", [CARD])) as opened:
            metrics = opened.read()
    finally:
        freed.set()

    assert (metrics.gpu_type, metrics.gpu_vram_available_gb) == ("amd", 20.0)


async def test_what_the_operator_says_is_in_the_heartbeat() -> None:
    word = OperatorWord(
        kept_memory_gb=1.0, override_cpu_cores_physical=3, override_gpu_vram_total_gb=8.0
    )
    async with reading(word=word, amd=lambda: GpuSample("amd", [CARD])) as opened:
        metrics = opened.read()

    assert metrics.kept is not None
    assert metrics.kept.memory_gb == 1.0
    assert metrics.cpu_cores_physical == 3
    assert metrics.overridden == [
        "cpu_cores_physical",
        "gpu_vram_total_gb",
        "gpu_vram_available_gb",
        "gpu_vram_max_available_gb",
    ]


async def test_gpus_are_not_even_looked_at_where_the_operator_says_none() -> None:
    before = set(threading.enumerate())
    with closing(await Reader.open(5.0, OperatorWord(override_gpu_type="none"))) as opened:
        metrics = opened.read()
        assert set(threading.enumerate()) <= before

    assert (metrics.gpu_type, metrics.gpu_vram_total_gb) == ("none", 0.0)


async def test_threads_end_with_their_reader() -> None:
    before = set(threading.enumerate())
    async with reading(amd=lambda: GpuSample("amd", [CARD])) as opened:
        opened.read()
        own = set(threading.enumerate()) - before
        assert own

    async def ended() -> bool:
        return not any(thread.is_alive() for thread in own)

    await until(ended, "the threads ended")
    await asyncio.sleep(0)
