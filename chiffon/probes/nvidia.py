"""NVIDIA GPUs, from NVML (the driver's own library) by way of nvidia-ml-py.

Source: the NVML API reference. ``nvmlInit`` is done once a process and again after a fork; its
calls can hang for ever in a wedged driver, so ``reader`` runs them in a thread of their own.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chiffon.messages import Gpu
from chiffon.probes.sample import GpuSample, pci_displays, printable, to_gb

VENDOR = "nvidia"
PCI_VENDOR = 0x10DE


class NvidiaProbe:
    """Reads every NVIDIA GPU.

    Args:
        sysfs: Mount point of sysfs; it tells a host without a GPU from one with a broken driver.
        nvml: The module that speaks to the driver; tests pass their own.
    """

    def __init__(self, sysfs: Path = Path("/sys"), nvml: Any = None) -> None:
        self._sysfs = sysfs
        self._nvml = nvml
        self._ready_in: int | None = None

    def read(self) -> GpuSample:
        """Return every GPU, in NVML's order; an error for each that is there and unreadable."""
        try:
            nvml = self._ready()
            count = nvml.nvmlDeviceGetCount()
        except Exception as error:
            # Whatever the binding raises: a host without the card is no error, one with it is.
            if not pci_displays(self._sysfs, PCI_VENDOR):
                return GpuSample(VENDOR)
            return GpuSample(VENDOR, errors=[f"nvidia: {error}"])
        gpus: list[Gpu] = []
        errors: list[str] = []
        for index in range(count):
            try:
                gpus.append(_read_one(nvml, index))
            except nvml.NVMLError as error:
                errors.append(f"nvidia gpu {index}: {error}")
        return GpuSample(VENDOR, gpus, errors)

    def _ready(self) -> Any:
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        if self._ready_in != os.getpid():
            self._nvml.nvmlInit()
            self._ready_in = os.getpid()
        return self._nvml


def _read_one(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = _unless_unsupported(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    use = _unless_unsupported(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    return Gpu(
        uuid=_as_text(_unless_unsupported(nvml, lambda: nvml.nvmlDeviceGetUUID(handle))),
        index=index,
        name=_as_text(_unless_unsupported(nvml, lambda: nvml.nvmlDeviceGetName(handle))),
        vram_total_gb=None if memory is None else to_gb(memory.total),
        vram_available_gb=None if memory is None else to_gb(memory.free),
        utilization_percent=None if use is None else float(use.gpu),
    )


def _unless_unsupported(nvml: Any, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except nvml.NVMLError_NotSupported:
        return None


def _as_text(value: str | bytes | None) -> str | None:
    said = value.decode(errors="replace") if isinstance(value, bytes) else value
    return None if said is None else printable(said)
