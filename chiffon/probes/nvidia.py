"""NVIDIA GPUs, from NVML (the driver's own library) by way of nvidia-ml-py.

Source: the NVML API reference, and for GPUs without memory of their own the reports of their
owners (nvtop 411 and 466, gpud 1170, ollama 12619): the driver answers NotSupported, a total of
0, or the host's memory, and counts the page cache as used, so MemTotal and MemAvailable stand in.

NVML's ``free`` is without what the driver keeps for itself, in version 1 of its memory call as in
version 2, so the older call is enough. Calls can hang for ever in a wedged driver: ``sampler``
runs them in a thread of their own.
"""

import contextlib
import os
import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from chiffon.contract.messages import Gpu
from chiffon.errors import ProbeError
from chiffon.probes.pci import Displays, driver
from chiffon.probes.sample import GpuSample, printable, to_gb

VENDOR = "nvidia"
PCI_VENDOR = 0x10DE

_NOT_AVAILABLE = 2**64 - 1
_NEAR = 0.05
"""How near to MemTotal a total must be to be the host's memory."""

_BOARDS = ("GB10", "Thor", "Orin", "Xavier")
"""Of what has no memory of its own. A rented ARM host may have as much memory as its card."""

_WHAT_TO_DO = {
    "NVMLError_LibraryNotFound": "libnvidia-ml.so.1 is missing: install the driver, or pass the"
    " GPUs into the container",
    "NVMLError_DriverNotLoaded": "load the kernel module (modprobe nvidia), or see dmesg for why"
    " it was not",
    "NVMLError_LibRmVersionMismatch": "the driver was updated while it was loaded: restart the"
    " agent, then the host if that does not help",
    "NVMLError_NoPermission": "the agent's user may not open /dev/nvidia*",
    "NVMLError_GpuIsLost": "it fell off the bus; the host has to be restarted",
}


class NvidiaProbe:
    """Reads every NVIDIA GPU; of a GPU that is partitioned (MIG) the instances.

    Args:
        root: Where ``/sys``, ``/proc`` and ``/dev`` are looked up; they tell a host without a GPU
            from one with a broken driver.
        nvml: The module that speaks to the driver; tests pass their own.
        machine: The processor's architecture. No x86 host is known whose NVIDIA GPU shares the
            host's memory, so there a driver that does not tell the memory is a problem.
    """

    def __init__(
        self, root: Path = Path("/"), nvml: Any = None, machine: str = platform.machine()
    ) -> None:
        self._root = root
        self._nvml = nvml
        self._may_be_unified = machine not in {"x86_64", "i686"}
        self._displays = Displays(root, PCI_VENDOR)
        self._ready_in: int | None = None
        self._source = ""

    def read(self) -> GpuSample:
        """Return every GPU, in NVML's order; an error for each that is there and unreadable."""
        is_sure = self._has_hardware()
        if not is_sure and not (self._root / "dev/dxg").exists():  # the GPU of a Windows host
            return GpuSample(VENDOR)
        try:
            nvml = self._ready()
            count = nvml.nvmlDeviceGetCount()
        except Exception as error:
            # Whatever the binding raises. The next reading starts the library again.
            self._stop()
            if not is_sure and _name(error) == "NVMLError_LibraryNotFound":
                return GpuSample(VENDOR)
            return GpuSample(VENDOR, errors=[_line("nvidia", error)])
        sample = GpuSample(VENDOR, source=self._source)
        for index in range(count):
            self._read_into(sample, nvml, index)
        self._tell_of_hidden(sample, nvml, count)
        return sample

    def _tell_of_hidden(self, sample: GpuSample, nvml: Any, count: int) -> None:
        """Add an error for each GPU that is on the PCI bus and that the driver does not show.

        A driver that lost one of four works on with three, and says nothing of it.
        """
        on_the_bus = {device.name: device for device in self._displays.read()}
        if count >= len(on_the_bus):
            return
        shown = {_address(nvml, index) for index in range(count)}
        if None in shown:
            few = f"{count} of" if count else "none of"
            sample.errors.append(
                f"nvidia: the driver shows {few} the {len(on_the_bus)} GPUs on the PCI bus "
                "(see dmesg)"
            )
            return
        for address, device in on_the_bus.items():
            if address in shown:
                continue
            if self._is_kept_from_us(address):
                sample.notes.append(f"nvidia gpu {address} is not passed into this container")
            elif (has := driver(device)) == "nvidia":
                sample.errors.append(
                    f"nvidia gpu {address}: on the PCI bus, and its driver does not show it "
                    "(see dmesg)"
                )
            else:
                sample.errors.append(f"nvidia gpu {address}: driver {has or 'none'} has it")

    def _is_kept_from_us(self, address: str) -> bool:
        """Tell whether the driver has a GPU whose device file is not here, as in a container."""
        try:
            said = (self._root / "proc/driver/nvidia/gpus" / address / "information").read_text()
        except OSError:
            return False
        minor = re.search(r"Device Minor:\s*(\d+)", said)
        return minor is not None and not (self._root / f"dev/nvidia{minor[1]}").exists()

    def _read_into(self, sample: GpuSample, nvml: Any, index: int) -> None:
        """Add one GPU, or its instances; whatever goes wrong with one leaves the others."""
        try:
            devices = _devices(nvml, index)
        except Exception as error:
            sample.errors.append(_line(f"nvidia gpu {index}", error))
            return
        for name, handle in devices.items():
            place = len(sample.gpus) + len(sample.errors)
            try:
                gpu = self._gpu(nvml, handle, place, is_instance=len(name) > 1)
                sample.gpus.append(gpu)
                used = _if_told(partial(_used, nvml, handle))
                if gpu.uuid is not None and used is not None:
                    sample.used[gpu.uuid] = used
            except Exception as error:
                said = " instance ".join(str(one) for one in name)
                sample.errors.append(_line(f"nvidia gpu {said}", error))

    def _has_hardware(self) -> bool:
        if self._displays.read() or (self._root / "dev/nvidiactl").exists():
            return True
        return self._is_tegra()

    def _is_tegra(self) -> bool:
        try:
            return b"nvidia,tegra" in (self._root / "proc/device-tree/compatible").read_bytes()
        except OSError:
            return False

    def _ready(self) -> Any:
        if self._nvml is None:
            self._nvml = _binding()
        if self._ready_in != os.getpid():
            # Once a process, and again after a fork: the library does not survive it.
            self._nvml.nvmlInit()
            self._ready_in = os.getpid()
            version = _if_told(self._nvml.nvmlSystemGetDriverVersion)
            self._source = f"nvmlDeviceGetMemoryInfo, driver {_as_text(version) or 'unknown'}"
        return self._nvml

    def _stop(self) -> None:
        if self._ready_in == os.getpid():
            self._ready_in = None
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _gpu(self, nvml: Any, handle: Any, index: int, *, is_instance: bool) -> Gpu:
        total, free, is_unified = self._memory(nvml, handle, is_instance)
        use = _if_told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        return Gpu(
            uuid=_as_text(_if_told(lambda: nvml.nvmlDeviceGetUUID(handle))),
            index=index,
            name=_as_text(_if_told(lambda: nvml.nvmlDeviceGetName(handle))),
            vram_total_gb=None if total is None else to_gb(total),
            vram_available_gb=None if free is None else to_gb(free),
            utilization_percent=None if use is None else float(min(use.gpu, 100)),
            is_unified=is_unified,
        )

    def _memory(
        self, nvml: Any, handle: Any, is_instance: bool
    ) -> tuple[int | None, int | None, bool]:
        """Return total and free bytes, and whether they are the host's memory."""
        memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        total = _known(memory.total) if memory is not None else 0
        host = psutil.virtual_memory()
        if self._may_be_unified and not is_instance:
            is_near = total is not None and abs(total - host.total) <= _NEAR * host.total
            if total == 0 or (is_near and self._is_board(nvml, handle)):
                return host.total, host.available, True
        if total == 0:
            raise ProbeError("the driver does not tell how much memory it has")
        free = _known(memory.free)
        if total is not None and free is not None:
            free = min(free, total)
        return total, free, False

    def _is_board(self, nvml: Any, handle: Any) -> bool:
        name = _as_text(_if_told(lambda: nvml.nvmlDeviceGetName(handle))) or ""
        return self._is_tegra() or any(board in name for board in _BOARDS)


def _binding() -> Any:
    """Return NVIDIA's own binding.

    Two older distributions put a module of the same name in its place: ``nvidia-ml-py3`` of 2017
    and early versions of ``pynvml``.

    Raises:
        ProbeError: Another module is in its place, or none.
    """
    try:
        import pynvml
    except Exception as error:  # whatever a module does that is not the one we mean
        raise ProbeError(f"the module pynvml does not load ({error})") from None
    if not hasattr(pynvml, "nvmlInitWithFlags"):
        raise ProbeError(
            f"the module pynvml at {pynvml.__file__} is not NVIDIA's: uninstall pynvml and"
            " nvidia-ml-py3, and install nvidia-ml-py again"
        )
    return pynvml


def _devices(nvml: Any, index: int) -> dict[tuple[int, ...], Any]:
    """Return the GPU, or each of its MIG instances; their indices have holes.

    The keys are the index of the GPU, and of the instance within it.
    """
    parent = nvml.nvmlDeviceGetHandleByIndex(index)
    if not (_told(nvml, lambda: nvml.nvmlDeviceGetMigMode(parent)) or (0, 0))[0]:
        return {(index,): parent}
    instances: dict[tuple[int, ...], Any] = {}
    for position in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        with contextlib.suppress(nvml.NVMLError_NotFound):
            instances[index, position] = nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, position)
    if not instances:
        raise ProbeError("MIG is on and it has no instances")
    return instances


def _address(nvml: Any, index: int) -> str | None:
    """Return where a GPU is on the bus, as the kernel writes it; ``None`` if it does not tell."""

    def told() -> str | None:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return _as_text(nvml.nvmlDeviceGetPciInfo(handle).busId)

    said = _if_told(told)
    # NVML writes the domain with eight digits, 00000000:41:00.0, and capital letters.
    return None if said is None else said.lower()[-len("0000:00:00.0") :]


def _used(nvml: Any, handle: Any) -> dict[int, int | None]:
    """Return the bytes that each process has on a GPU; as the host numbers processes."""
    found: dict[int, int | None] = {}
    for one in (
        *nvml.nvmlDeviceGetComputeRunningProcesses(handle),
        *nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
    ):
        size = None if one.usedGpuMemory is None else _known(one.usedGpuMemory)
        # Of what both list, the larger: the two overlap.
        before = found.get(one.pid, 0)
        found[one.pid] = None if size is None or before is None else max(size, before)
    return found


def _if_told(call: Callable[[], Any]) -> Any:
    """Return what the driver says, ``None`` for any trouble: not worth the card's memory."""
    try:
        return call()
    except Exception:
        return None


def _told(nvml: Any, call: Callable[[], Any]) -> Any:
    """Return what the driver says, ``None`` where it has no answer for this device."""
    try:
        return call()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def _known(size: int) -> int | None:
    return None if size == _NOT_AVAILABLE else size


def _as_text(value: str | bytes | None) -> str | None:
    said = value.decode(errors="replace") if isinstance(value, bytes) else value
    return None if said is None else printable(said)


def _name(error: Exception) -> str:
    return type(error).__name__


def _line(what: str, error: Exception) -> str:
    advice = _WHAT_TO_DO.get(_name(error))
    return f"{what}: {error}" + (f" ({advice})" if advice else "")
