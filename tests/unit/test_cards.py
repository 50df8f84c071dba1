"""AMD's and Intel's GPUs, from trees of /sys."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from chiffon.contract.messages import Gpu
from chiffon.probes import amd, intel, pci
from tests.fixtures.trees import plant

GIB = 2**30


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=124 * GIB, available=50 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_desktop_has_its_amd_card_and_not_the_gpu_of_its_processor(tmp_path: Path) -> None:
    sample = amd.probe(plant(tmp_path, "amd-desktop")).read()

    assert sample.gpus == [
        Gpu(
            uuid="d8a5e1b9c3f70142",
            index=0,
            name="pci 1002:744c",
            vram_total_gb=23.984,
            vram_available_gb=17.984,
            utilization_percent=37.0,
        )
    ]
    assert sample.errors == []
    assert sample.notes == [
        "amd gpu 0000:0e:00.0 is integrated and left out; CHIFFON_INTEGRATED_GPUS=true counts it"
    ]


# Of the same APU: total and free of what counts, and whether it is the host's memory.
APUS = {
    # GTT of 62 GiB with 2 GiB in use, but the host has only 50 GiB left.
    "amd-apu": (62.0, 50.0, True),
    "amd-apu-carve-out": (96.0, 60.0, False),
}


@pytest.mark.parametrize("tree", APUS)
def test_of_an_apu_the_larger_pool_counts_where_it_is_asked_for(tmp_path: Path, tree: str) -> None:
    root = plant(tmp_path, tree)

    ignored = amd.probe(root).read()
    [gpu] = amd.probe(root, integrated_gpus=True).read().gpus

    assert not ignored.is_present
    assert (gpu.vram_total_gb, gpu.vram_available_gb, gpu.is_unified) == APUS[tree]


def test_a_card_that_sleeps_is_idle_and_is_not_woken(tmp_path: Path) -> None:
    [gpu] = amd.probe(plant(tmp_path, "amd-asleep")).read().gpus

    assert (gpu.utilization_percent, gpu.vram_total_gb) == (0.0, 8.0)


def test_a_card_that_does_not_tell_its_use_has_its_memory_all_the_same(tmp_path: Path) -> None:
    sample = amd.probe(plant(tmp_path, "amd-resetting")).read()

    assert [(gpu.utilization_percent, gpu.vram_available_gb) for gpu in sample.gpus] == [
        (None, 18.0)
    ]
    assert sample.errors == []


def test_a_card_without_a_driver_is_an_error_and_not_an_absent_card(tmp_path: Path) -> None:
    sample = amd.probe(plant(tmp_path, "amd-without-driver")).read()

    assert sample.gpus == []
    assert sample.errors == ["amd gpu 0000:03:00.0: driver none shows no card for it"]


def test_discrete_intel_cards_tell_their_memory_where_the_driver_does(tmp_path: Path) -> None:
    sample = intel.probe(plant(tmp_path, "intel-desktop")).read()

    assert [(gpu.index, gpu.name, gpu.vram_total_gb) for gpu in sample.gpus] == [
        (0, "pci 8086:56a0", 15.906),
        (1, "pci 8086:56c0", 15.111),
    ]
    assert {gpu.vram_available_gb for gpu in sample.gpus} == {None}
    assert [note[:40] for note in sample.notes] == ["intel gpu 0000:00:02.0 is integrated and"]


def test_what_mainline_does_not_tell_of_an_intel_card_is_unknown(tmp_path: Path) -> None:
    [gpu] = intel.probe(plant(tmp_path, "intel-mainline")).read().gpus

    assert (gpu.vram_total_gb, gpu.vram_available_gb, gpu.utilization_percent) == (None,) * 3


def test_an_integrated_intel_gpu_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    sample = intel.probe(plant(tmp_path, "intel-desktop"), integrated_gpus=True).read()

    assert [(gpu.is_unified, gpu.vram_total_gb) for gpu in sample.gpus] == [
        (True, None),
        (False, 15.906),
        (False, 15.111),
    ]


@pytest.mark.parametrize("tree", ["no-gpu", "nvidia", "cgroup-v2-no-limit"])
def test_a_host_without_cards_of_a_vendor_reads_as_nothing(tmp_path: Path, tree: str) -> None:
    root = plant(tmp_path, tree)

    assert not amd.probe(root).read().is_present
    assert not intel.probe(root).read().is_present


def device_of(root: Path, card: str) -> Path:
    return (root / "sys/class/drm" / card / "device").resolve()


def test_a_missing_file_reads_as_unknown_and_not_as_zero(tmp_path: Path) -> None:
    root = plant(tmp_path, "amd-desktop")
    for name in ("mem_info_vram_total", "mem_info_vram_used", "gpu_busy_percent", "unique_id"):
        (device_of(root, "card1") / name).unlink()

    [gpu] = amd.probe(root).read().gpus

    assert (gpu.vram_total_gb, gpu.vram_available_gb, gpu.utilization_percent) == (None,) * 3
    assert gpu.uuid is None


@pytest.mark.parametrize("content", ["plenty\n", "", "0x\n", "1.5\n"])
def test_a_file_that_is_no_number_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    root = plant(tmp_path, "amd-desktop")
    (device_of(root, "card1") / "mem_info_vram_total").write_text(content)

    sample = amd.probe(root, integrated_gpus=True).read()

    assert [gpu.name for gpu in sample.gpus] == ["pci 1002:164e"]
    [error] = sample.errors
    assert error.startswith("amd gpu 0000:03:00.0: ")
    assert "mem_info_vram_total" in error
    assert "is not a number" in error


def test_more_used_than_there_is_leaves_nothing_free(tmp_path: Path) -> None:
    root = plant(tmp_path, "amd-desktop")
    (device_of(root, "card1") / "mem_info_vram_used").write_text(f"{25 * GIB}\n")

    [gpu] = amd.probe(root).read().gpus

    assert gpu.vram_available_gb == 0.0


def test_the_bus_is_looked_at_again_after_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(pci, "time", SimpleNamespace(monotonic=lambda: clock.now))
    displays = pci.Displays(tmp_path, 0x1002)
    assert displays.read() == []
    plant(tmp_path, "amd-without-driver")

    clock.now += pci.LOOK_AGAIN_SECONDS - 1
    assert displays.read() == []

    clock.now += 1
    assert [device.name for device in displays.read()] == ["0000:03:00.0"]
