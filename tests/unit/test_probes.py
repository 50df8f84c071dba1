"""Probes on captured trees, and on drivers that misbehave."""

import asyncio
import threading
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chiffon.messages import Gpu
from chiffon.probes import amd, intel, reader
from chiffon.probes.host import HostProbe, free_cores
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.reader import Reader
from chiffon.probes.sample import GpuSample

GIB = 2**30


def plug(sysfs: Path, card: str, files: dict[str, str], address: str = "0000:03:00.0") -> None:
    """Put a card into a tree as the kernel has it: a PCI device, and a link to it."""
    device = sysfs / "devices/pci0000:00" / address
    device.mkdir(parents=True)
    for name, content in {"class": "0x030000\n", **files}.items():
        (device / name).write_text(content)
    folder = sysfs / "class/drm" / card
    folder.mkdir(parents=True)
    (folder / "device").symlink_to(device)
    listed = sysfs / "bus/pci/devices"
    listed.mkdir(parents=True, exist_ok=True)
    (listed / address).symlink_to(device)


AMD_CARD = {
    "vendor": "0x1002\n",
    "mem_info_vram_total": f"{16 * GIB}\n",
    "mem_info_vram_used": f"{6 * GIB}\n",
    "gpu_busy_percent": "37\n",
    "unique_id": "7d7d\n",
    "product_name": "Radeon\n",
}


def test_an_amd_card_is_read_from_its_files(tmp_path: Path) -> None:
    plug(tmp_path, "card1", AMD_CARD)

    sample = amd.read(tmp_path)

    assert sample.gpus == [
        Gpu(
            uuid="7d7d",
            index=0,
            name="Radeon",
            vram_total_gb=16.0,
            vram_available_gb=10.0,
            utilization_percent=37.0,
        )
    ]


def test_missing_file_reads_as_unknown_not_zero(tmp_path: Path) -> None:
    plug(tmp_path, "card0", {"vendor": "0x1002\n"})

    [gpu] = amd.read(tmp_path).gpus

    assert (gpu.vram_total_gb, gpu.vram_available_gb, gpu.utilization_percent) == (None, None, None)


def test_a_file_that_is_no_number_is_an_error_that_names_it(tmp_path: Path) -> None:
    plug(tmp_path, "card0", {**AMD_CARD, "mem_info_vram_total": "plenty\n"})
    plug(tmp_path, "card1", AMD_CARD, address="0000:04:00.0")

    sample = amd.read(tmp_path)

    assert [gpu.index for gpu in sample.gpus] == [1]
    assert "mem_info_vram_total: 'plenty' is not a number" in sample.errors[0]


def test_more_used_than_there_is_leaves_nothing_free(tmp_path: Path) -> None:
    plug(tmp_path, "card0", {**AMD_CARD, "mem_info_vram_used": f"{20 * GIB}\n"})

    [gpu] = amd.read(tmp_path).gpus

    assert gpu.vram_available_gb == 0.0


def test_connectors_render_nodes_and_other_vendors_are_no_cards(tmp_path: Path) -> None:
    plug(tmp_path, "card0", {**AMD_CARD, "vendor": "0x8086\n"})
    for name in ("card0-HDMI-A-1", "renderD128", "version"):
        (tmp_path / "class/drm" / name).mkdir()

    assert amd.read(tmp_path).gpus == []


def test_an_integrated_intel_gpu_is_left_out_and_a_discrete_one_is_there(tmp_path: Path) -> None:
    plug(tmp_path, "card0", {"vendor": "0x8086\n"}, address="0000:00:02.0")
    plug(tmp_path, "card1", {"vendor": "0x8086\n"}, address="0000:03:00.0")

    sample = intel.read(tmp_path)

    assert [(gpu.index, gpu.vram_available_gb) for gpu in sample.gpus] == [(0, None)]


def test_a_host_without_any_card_reads_as_nothing(tmp_path: Path) -> None:
    assert not amd.read(tmp_path).is_present
    assert not intel.read(tmp_path).is_present


class FakeNvml:
    """NVML as the binding shows it, with the cards that a test wants."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, cards: list[Any], broken: Exception | None = None) -> None:
        self.cards = cards
        self.broken = broken
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1
        if self.broken:
            raise self.broken

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if isinstance(self.cards[index], Exception):
            raise self.cards[index]
        return self.cards[index]

    def nvmlDeviceGetMemoryInfo(self, card: Any) -> Any:
        return SimpleNamespace(total=card["total"] * GIB, free=card["free"] * GIB)

    def nvmlDeviceGetUtilizationRates(self, card: Any) -> Any:
        if "use" not in card:
            raise self.NVMLError_NotSupported
        return SimpleNamespace(gpu=card["use"])

    def nvmlDeviceGetUUID(self, card: Any) -> Any:
        return card.get("uuid", b"GPU-1")

    def nvmlDeviceGetName(self, card: Any) -> Any:
        return "RTX\x00 4090"


def test_nvidia_cards_are_read_and_a_lost_one_costs_only_itself(tmp_path: Path) -> None:
    nvml = FakeNvml(
        [
            {"total": 24, "free": 20, "use": 3},
            FakeNvml.NVMLError("GPU is lost"),
            {"total": 8, "free": 8},
        ]
    )

    sample = NvidiaProbe(tmp_path, nvml).read()

    assert [(gpu.index, gpu.vram_available_gb, gpu.utilization_percent) for gpu in sample.gpus] == [
        (0, 20.0, 3.0),
        (2, 8.0, None),
    ]
    assert (sample.gpus[0].uuid, sample.gpus[0].name) == ("GPU-1", "RTX  4090")
    assert sample.errors == ["nvidia gpu 1: GPU is lost"]
    assert (sample.total_gb, sample.available_gb) == (32.0, 28.0)


def test_nvml_is_started_once_a_process(tmp_path: Path) -> None:
    nvml = FakeNvml([{"total": 24, "free": 20}])
    probe = NvidiaProbe(tmp_path, nvml)

    for _ in range(3):
        probe.read()

    assert nvml.starts == 1


def test_no_driver_and_no_card_is_nothing_but_no_driver_and_a_card_is_an_error(
    tmp_path: Path,
) -> None:
    broken = NvidiaProbe(tmp_path, FakeNvml([], broken=FakeNvml.NVMLError("Driver Not Loaded")))
    assert not broken.read().is_present

    plug(tmp_path, "card0", {"vendor": "0x10de\n"})
    sample = broken.read()

    assert sample.errors == ["nvidia: Driver Not Loaded"]
    assert (sample.total_gb, sample.available_gb) == (None, None)


@pytest.mark.parametrize(
    ("busy", "online", "usable", "free"),
    [
        (0.0, 8, 8.0, 8),
        (12.5, 16, 16.0, 14),
        (13.0, 16, 16.0, 13),
        (100.0, 8, 8.0, 0),
        (50.0, 8, 1.5, 0),
        (0.0, 8, 1.5, 1),
        (None, 8, 8.0, None),
        (10.0, None, 8.0, None),
    ],
)
def test_free_cores_are_whole_and_never_below_zero(
    busy: float | None, online: int | None, usable: float, free: int | None
) -> None:
    assert free_cores(busy, online, usable) == free


Times = namedtuple("Times", "user system idle iowait guest")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Times]:
    """What the kernel says of two CPUs, reading after reading; the last one stays."""
    readings: list[Times] = []
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 2)
    monkeypatch.setattr(
        "psutil.cpu_times", lambda: readings.pop(0) if len(readings) > 1 else readings[0]
    )
    return readings


def test_cpu_use_is_unknown_until_there_are_two_samples(clock: list[Times]) -> None:
    clock += [Times(10, 0, 10, 0, 0), Times(11, 0.5, 10, 0.5, 1)]
    probe = HostProbe()

    first, second = probe.read(), probe.read()

    assert (first.cpu_percent, first.cpu_cores_available) == (None, None)
    # One second of guest time is in the user time already; waiting for a disk is idle.
    assert second.cpu_percent == 75.0
    assert second.memory_available_gb is not None


def test_two_readings_close_together_do_not_make_a_busy_host_look_idle(
    clock: list[Times],
) -> None:
    clock += [Times(0, 0, 0, 0, 0), Times(2, 0, 0, 0, 0), Times(2, 0, 0.01, 0, 0)]
    probe = HostProbe()

    readings = [probe.read().cpu_percent for _ in range(3)]

    assert readings == [None, 100.0, 100.0]


def test_two_probes_do_not_spoil_each_others_readings(clock: list[Times]) -> None:
    clock += [Times(0, 0, 0, 0, 0), Times(1, 0, 1, 0, 0), Times(2, 0, 2, 0, 0)]
    one, other = HostProbe(), HostProbe()

    one.read()
    other.read()

    assert one.read().cpu_percent == 50.0


def card(index: int, total: float, free: float | None) -> Gpu:
    return Gpu(index=index, vram_total_gb=total, vram_available_gb=free)


async def read_once(*sources: reader.GpuSource) -> Any:
    opened = await Reader.open(sources)
    try:
        return await opened.read()
    finally:
        opened.close()


async def test_no_gpu_at_all_is_a_known_none() -> None:
    metrics = await read_once(lambda: GpuSample("nvidia"), lambda: GpuSample("amd"))

    assert (metrics.gpu_type, metrics.gpu_vram_total_gb, metrics.gpus) == ("none", 0.0, [])


async def test_the_scalars_speak_for_the_vendor_with_most_vram_and_all_cards_are_listed() -> None:
    metrics = await read_once(
        lambda: GpuSample("intel", [card(0, 8.0, None)]),
        lambda: GpuSample("nvidia", [card(0, 24.0, 20.0), card(1, 24.0, 4.0)]),
    )

    assert metrics.gpu_type == "nvidia"
    assert (metrics.gpu_vram_total_gb, metrics.gpu_vram_available_gb) == (48.0, 24.0)
    assert [gpu.index for gpu in metrics.gpus] == [0, 1, 2]


async def test_a_broken_driver_is_its_vendor_with_unknown_vram_and_a_reason() -> None:
    metrics = await read_once(lambda: GpuSample("nvidia", errors=["nvidia: Driver\nNot Loaded"]))

    assert (metrics.gpu_type, metrics.gpu_vram_available_gb) == ("nvidia", None)
    assert metrics.probe_errors == ["nvidia: Driver Not Loaded"]


async def test_a_source_with_a_bug_costs_only_itself() -> None:
    def buggy() -> GpuSample:
        raise ZeroDivisionError("oops")

    metrics = await read_once(buggy, lambda: GpuSample("amd", [card(0, 16.0, 10.0)]))

    assert (metrics.gpu_type, metrics.gpu_vram_available_gb) == ("amd", 10.0)
    assert metrics.probe_errors == ["gpus: ZeroDivisionError: oops"]


async def test_a_driver_that_hangs_neither_stops_the_reading_nor_keeps_old_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hang, hangs = threading.Event(), threading.Event()

    def driver() -> GpuSample:
        if hangs.is_set():
            hang.wait()
        return GpuSample("nvidia", [card(0, 24.0, 20.0)])

    opened = await Reader.open([driver])
    try:
        assert (await opened.read()).gpu_vram_available_gb == 20.0
        hangs.set()

        async with asyncio.timeout(5):
            recent = await opened.read()
            monkeypatch.setattr(reader, "HUNG_GPU_SAMPLE_SECONDS", 0.0)
            old = await opened.read()
    finally:
        hang.set()
        opened.close()

    assert recent.gpu_vram_available_gb == 20.0
    assert (old.gpu_vram_total_gb, old.gpu_vram_available_gb) == (24.0, None)
    assert "has not answered for" in old.probe_errors[0]


async def test_a_driver_that_hangs_from_the_start_is_unknown_and_not_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "FIRST_GPU_SAMPLE_SECONDS", 0.05)
    hang = threading.Event()

    def driver() -> GpuSample:
        hang.wait()
        return GpuSample("nvidia")

    try:
        metrics = await read_once(driver)
    finally:
        hang.set()

    assert (metrics.gpu_type, metrics.gpu_vram_total_gb) == (None, None)
    assert metrics.probe_errors == ["gpus: the drivers have not answered yet"]
