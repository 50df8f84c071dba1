"""The NVIDIA probe against drivers in every state: one fake NVML, one line a scenario."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from chiffon.probes.nvidia import NvidiaProbe
from tests.fixtures.nvml import (
    GIB,
    NOT_AVAILABLE,
    Card,
    FakeNvml,
    NVMLError,
    NVMLError_DriverNotLoaded,
    NVMLError_FunctionNotFound,
    NVMLError_GpuIsLost,
    NVMLError_LibraryNotFound,
    NVMLError_LibRmVersionMismatch,
    NVMLError_NoPermission,
    NVMLError_NotSupported,
    NVMLError_Uninitialized,
)
from tests.fixtures.trees import plant

PROJECT = Path(__file__).parents[2]
HOST_TOTAL, HOST_FREE = 120 * GIB, 110 * GIB


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=HOST_TOTAL, available=HOST_FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return plant(tmp_path, "nvidia-one")


MIG = Card(
    # The parent of MIG instances refuses, and is not asked.
    total=NVMLError_NoPermission(),
    instances=[
        Card(total=10 * GIB, free=9 * GIB, use=None, uuid="MIG-1"),
        None,
        Card(total=20 * GIB, free=5 * GIB, use=None, uuid="MIG-2"),
        None,
    ],
)

# Each card as (index, total, free, utilization, unified).
SCENARIOS = {
    "one card": (
        [Card()],
        "x86_64",
        [(0, 24.0, 20.0, 3.0, False)],
        [],
    ),
    "a lost card leaves its siblings": (
        [Card(), Card(lost=NVMLError_GpuIsLost()), Card(total=8 * GIB, free=8 * GIB)],
        "x86_64",
        [(0, 24.0, 20.0, 3.0, False), (2, 8.0, 8.0, 3.0, False)],
        ["nvidia gpu 1: GPU is lost (it fell off the bus; the host has to be restarted)"],
    ),
    "a card that we may not read": (
        [Card(total=NVMLError_NoPermission()), Card()],
        "x86_64",
        [(1, 24.0, 20.0, 3.0, False)],
        ["nvidia gpu 0: Insufficient Permissions (the agent's user may not open /dev/nvidia*)"],
    ),
    "instances, not the parent, with holes between them": (
        [MIG, Card()],
        "x86_64",
        [
            (0, 10.0, 9.0, None, False),
            (1, 20.0, 5.0, None, False),
            (2, 24.0, 20.0, 3.0, False),
        ],
        [],
    ),
    "an instance that we may not read leaves its siblings": (
        [Card(instances=[Card(total=NVMLError_NoPermission()), Card(total=GIB, free=GIB)])],
        "x86_64",
        [(1, 1.0, 1.0, 3.0, False)],
        [
            "nvidia gpu 0 instance 0: Insufficient Permissions (the agent's user may not open"
            " /dev/nvidia*)"
        ],
    ),
    "MIG without instances": (
        [Card(instances=[None, None])],
        "x86_64",
        [],
        ["nvidia gpu 0: MIG is on and it has no instances"],
    ),
    "unified memory: not supported": (
        [Card(total=NVMLError_NotSupported())],
        "aarch64",
        [(0, 120.0, 110.0, 3.0, True)],
        [],
    ),
    "unified memory: a total of zero": (
        [Card(total=0, free=0)],
        "aarch64",
        [(0, 120.0, 110.0, 3.0, True)],
        [],
    ),
    "unified memory: the host's memory, with the page cache as used": (
        [Card(total=119 * GIB, free=2 * GIB, name="NVIDIA GB10")],
        "aarch64",
        [(0, 120.0, 110.0, 3.0, True)],
        [],
    ),
    "a card with memory of its own in an ARM host": (
        [Card(total=80 * GIB, free=70 * GIB)],
        "aarch64",
        [(0, 80.0, 70.0, 3.0, False)],
        [],
    ),
    "a card with as much memory as its ARM host": (
        [Card(total=119 * GIB, free=2 * GIB, name="NVIDIA T4G")],
        "aarch64",
        [(0, 119.0, 2.0, 3.0, False)],
        [],
    ),
    "a driver that starts and shows nothing": (
        [],
        "x86_64",
        [],
        ["nvidia gpu 0000:01:00.0: on the PCI bus, and its driver does not show it (see dmesg)"],
    ),
    "a card with as much memory as its x86 host": (
        [Card(total=120 * GIB, free=2 * GIB)],
        "x86_64",
        [(0, 120.0, 2.0, 3.0, False)],
        [],
    ),
    "an x86 host whose driver does not tell": (
        [Card(total=NVMLError_NotSupported()), Card(total=0, free=0)],
        "x86_64",
        [],
        [
            "nvidia gpu 0: the driver does not tell how much memory it has",
            "nvidia gpu 1: the driver does not tell how much memory it has",
        ],
    ),
    "all bits set is unknown": (
        [Card(total=24 * GIB, free=NOT_AVAILABLE), Card(total=NOT_AVAILABLE, free=GIB)],
        "x86_64",
        [(0, 24.0, None, 3.0, False), (1, None, 1.0, 3.0, False)],
        [],
    ),
    "more free than there is": (
        [Card(total=24 * GIB, free=25 * GIB, use=101)],
        "x86_64",
        [(0, 24.0, 24.0, 100.0, False)],
        [],
    ),
    "an older driver without utilization": (
        [Card(use=None)],
        "x86_64",
        [(0, 24.0, 20.0, None, False)],
        [],
    ),
}


@pytest.mark.usefixtures("host_memory")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_driver_is_read_for_what_it_is(root: Path, name: str) -> None:
    cards, machine, expected, errors = SCENARIOS[name]

    sample = NvidiaProbe(root, FakeNvml(cards), machine).read()

    assert [
        (
            gpu.index,
            gpu.vram_total_gb,
            gpu.vram_available_gb,
            gpu.utilization_percent,
            gpu.is_unified,
        )
        for gpu in sample.gpus
    ] == expected
    assert sample.errors == errors


BROKEN = {
    "the library is missing": (NVMLError_LibraryNotFound(), "install the driver"),
    "the driver is not loaded": (NVMLError_DriverNotLoaded(), "modprobe nvidia"),
    "library and driver do not match": (NVMLError_LibRmVersionMismatch(), "restart the agent"),
    "no permission": (NVMLError_NoPermission(), "may not open /dev/nvidia*"),
    "something new": (NVMLError("Unknown Error"), "Unknown Error"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_driver_is_an_error_that_says_what_to_do(root: Path, name: str) -> None:
    broken, advice = BROKEN[name]

    sample = NvidiaProbe(root, FakeNvml([Card()], broken=broken)).read()

    assert sample.is_present
    assert (sample.vendor, sample.gpus) == ("nvidia", [])
    [error] = sample.errors
    assert error.startswith(f"nvidia: {broken}")
    assert advice in error


@pytest.mark.parametrize("tree", ["no-gpu", "nvidia-for-a-guest", "amd-desktop"])
def test_a_host_without_such_a_card_is_not_asked(tmp_path: Path, tree: str) -> None:
    nvml = FakeNvml([Card()])

    sample = NvidiaProbe(plant(tmp_path, tree), nvml).read()

    assert not sample.is_present
    assert nvml.starts == 0


def test_a_board_without_a_pci_gpu_is_known_by_its_device_tree(tmp_path: Path) -> None:
    root = plant(tmp_path, "nvidia-jetson")

    sample = NvidiaProbe(root, FakeNvml(broken=NVMLError_LibraryNotFound())).read()

    assert sample.is_present


def test_the_gpu_of_a_windows_host_is_read_and_may_be_another_vendors(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()

    there = NvidiaProbe(tmp_path, FakeNvml([Card()])).read()
    not_there = NvidiaProbe(tmp_path, FakeNvml(broken=NVMLError_LibraryNotFound())).read()

    assert len(there.gpus) == 1
    assert not not_there.is_present


def test_what_a_driver_calls_a_card_is_printable_text(root: Path) -> None:
    nvml = FakeNvml([Card(uuid=b"GPU-\xff", name="RTX\x00 4090\n")])

    [gpu] = NvidiaProbe(root, nvml).read().gpus

    assert (gpu.uuid, gpu.name) == ("GPU-\N{REPLACEMENT CHARACTER}", "RTX  4090 ")


def test_the_library_is_started_once_a_process(root: Path) -> None:
    nvml = FakeNvml([Card()])
    probe = NvidiaProbe(root, nvml)

    for _ in range(3):
        probe.read()

    assert nvml.starts == 1


def test_a_driver_that_was_reloaded_is_found_again(root: Path) -> None:
    nvml = FakeNvml([Card()])
    probe = NvidiaProbe(root, nvml)
    probe.read()
    nvml.is_ready = False  # as it is after the module was taken out and put in again

    gone, back = probe.read(), probe.read()

    assert gone.errors == [f"nvidia: {NVMLError_Uninitialized()}"]
    assert len(back.gpus) == 1


FORK = """
import os, sys
from pathlib import Path
from chiffon.probes.nvidia import NvidiaProbe
from tests.fixtures.nvml import Card, FakeNvml

nvml = FakeNvml([Card()])
probe = NvidiaProbe(Path(sys.argv[1]), nvml)
assert len(probe.read().gpus) == 1 and nvml.starts == 1
child = os.fork()
if child == 0:
    again = probe.read()
    os._exit(0 if (len(again.gpus), nvml.starts) == (1, 2) else 1)
_, status = os.waitpid(child, 0)
probe.read()
sys.exit(os.waitstatus_to_exitcode(status) or nvml.starts != 1)
"""


def test_after_a_fork_the_child_starts_the_library_itself(root: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORK, root], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def impostor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the same name, as nvidia-ml-py3 of 2017 installs it."""
    module = ModuleType("pynvml")
    module.__file__ = "site-packages/pynvml.py"
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


@pytest.mark.usefixtures("impostor")
def test_another_module_of_that_name_is_refused(root: Path) -> None:
    sample = NvidiaProbe(root).read()

    [error] = sample.errors
    assert error.startswith("nvidia: the module pynvml at site-packages/pynvml.py is not NVIDIA's")
    assert "install nvidia-ml-py again" in error


def test_a_module_that_does_not_load_is_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    [error] = NvidiaProbe(root).read().errors

    assert error.startswith("nvidia: the module pynvml does not load")


def test_the_real_binding_has_all_that_the_fake_has() -> None:
    import pynvml

    for name in (*vars(FakeNvml), "nvmlInitWithFlags"):
        if name.lower().startswith("nvml"):
            assert hasattr(pynvml, name), name


def test_the_real_binding_without_a_driver_is_an_error_and_not_an_absent_gpu(root: Path) -> None:
    sample = NvidiaProbe(root).read()

    if sample.gpus:
        pytest.skip("this host has an NVIDIA GPU")
    assert sample.is_present
    assert sample.errors[0].startswith("nvidia: ")


def test_a_side_question_that_fails_does_not_cost_the_cards_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    nvml = FakeNvml([Card(), Card()])
    for name in ("nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetUtilizationRates"):
        monkeypatch.setattr(nvml, name, fails)

    sample = NvidiaProbe(root, nvml).read()

    assert [(gpu.name, gpu.vram_available_gb) for gpu in sample.gpus] == [(None, 20.0)] * 2
    assert sample.errors == []


def test_functions_that_an_old_driver_lacks_are_no_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise NVMLError_FunctionNotFound

    nvml = FakeNvml([Card()])
    for name in ("nvmlDeviceGetMigMode", "nvmlSystemGetDriverVersion"):
        monkeypatch.setattr(nvml, name, missing)

    sample = NvidiaProbe(root, nvml).read()

    assert len(sample.gpus) == 1
    assert sample.source == "nvmlDeviceGetMemoryInfo, driver unknown"


FOUR = ["0000:01:00.0", "0000:41:00.0", "0000:81:00.0", "0000:c1:00.0"]


def bus(root: Path, addresses: Sequence[str], driver: str = "nvidia") -> None:
    """Put GPUs on the PCI bus of a host."""
    for address in addresses:
        device = root / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x10de\n")
        (device / "class").write_text("0x030200\n")
        (device / "driver").symlink_to(f"../../../../bus/pci/drivers/{driver}")


def test_a_driver_that_lost_one_of_four_says_which(tmp_path: Path) -> None:
    bus(tmp_path, FOUR)
    shown = [Card(bus=f"0000{address.upper()}", uuid=address) for address in FOUR[:3]]

    sample = NvidiaProbe(tmp_path, FakeNvml(shown)).read()

    assert len(sample.gpus) == 3
    assert sample.errors == [
        "nvidia gpu 0000:c1:00.0: on the PCI bus, and its driver does not show it (see dmesg)"
    ]


def test_a_driver_that_does_not_tell_where_its_gpus_are_is_counted(tmp_path: Path) -> None:
    bus(tmp_path, FOUR)

    sample = NvidiaProbe(tmp_path, FakeNvml([Card(), Card(), Card()])).read()

    assert sample.errors == ["nvidia: the driver shows 3 of the 4 GPUs on the PCI bus (see dmesg)"]


def test_a_gpu_that_another_driver_has_is_named_with_it(tmp_path: Path) -> None:
    bus(tmp_path, FOUR[:1])
    bus(tmp_path, FOUR[1:2], driver="nouveau")

    sample = NvidiaProbe(tmp_path, FakeNvml([Card(bus="00000000:01:00.0")])).read()

    assert sample.errors == ["nvidia gpu 0000:41:00.0: driver nouveau has it"]


def test_gpus_that_a_container_was_not_given_are_no_trouble(tmp_path: Path) -> None:
    bus(tmp_path, FOUR[:2])
    for minor, address in enumerate(FOUR[:2]):
        told = tmp_path / "proc/driver/nvidia/gpus" / address / "information"
        told.parent.mkdir(parents=True)
        told.write_text(f"Model: \t\t H200\nDevice Minor: \t {minor}\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()

    sample = NvidiaProbe(tmp_path, FakeNvml([Card(bus="00000000:01:00.0")])).read()

    assert sample.errors == []
    assert sample.notes == ["nvidia gpu 0000:41:00.0 is not passed into this container"]


def test_parts_of_a_gpu_that_are_made_for_virtual_machines_are_no_gpus(tmp_path: Path) -> None:
    bus(tmp_path, FOUR)
    for address in FOUR[1:]:
        (tmp_path / "sys/bus/pci/devices" / address / "physfn").symlink_to(f"../{FOUR[0]}")

    sample = NvidiaProbe(tmp_path, FakeNvml([Card(bus="00000000:01:00.0")])).read()

    assert sample.errors == []
