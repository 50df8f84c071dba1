"""All sources together, as the ``resources`` of one heartbeat.

GPU drivers can hang, so a daemon thread reads them and the heartbeat takes the last sample: it
waits a moment for a fresh one and then goes without. When a driver has not answered for long, the
last sample is no longer news, and its free VRAM becomes unknown, with the reason.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from chiffon.messages import Gpu, ResourceMetrics
from chiffon.probes import amd, intel
from chiffon.probes.host import HostProbe
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.sample import GpuSample, printable

FIRST_CPU_SAMPLE_SECONDS = 0.25
FIRST_GPU_SAMPLE_SECONDS = 2.0
FRESH_GPU_SAMPLE_SECONDS = 1.0
HUNG_GPU_SAMPLE_SECONDS = 15.0

GpuSource = Callable[[], GpuSample]


def sources(sysfs: Path = Path("/sys")) -> list[GpuSource]:
    """Return a source for each vendor we can read."""
    return [
        NvidiaProbe(sysfs).read,
        functools.partial(amd.read, sysfs),
        functools.partial(intel.read, sysfs),
    ]


class Reader:
    """Reads this host. Made by ``open``; used from the loop's thread.

    Args:
        gpu_sources: One for each vendor, run in a thread of their own.
    """

    def __init__(self, gpu_sources: Sequence[GpuSource]) -> None:
        self._host = HostProbe()
        self._sources = gpu_sources
        self._samples: list[GpuSample] | None = None
        self._asked = 0.0
        self._wanted = threading.Event()
        self._taken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._stopped = False

    @classmethod
    async def open(cls, gpu_sources: Sequence[GpuSource] | None = None) -> Self:
        """Start to read: two CPU samples 0.25 s apart, and the first of the GPUs.

        A first GPU sample may take seconds where the driver has to load; after 2 s we go on.
        """
        reader = cls(sources() if gpu_sources is None else gpu_sources)
        reader._host.read()
        threading.Thread(target=reader._read_gpus, name="gpu-probes", daemon=True).start()
        await asyncio.gather(
            asyncio.sleep(FIRST_CPU_SAMPLE_SECONDS),
            reader._fresh_gpus(FIRST_GPU_SAMPLE_SECONDS),
        )
        return reader

    async def read(self) -> ResourceMetrics:
        """Return what the host has free now, ``None`` with a reason for what cannot be read."""
        if self._taken.is_set():  # else the last sample asked for is still on its way
            await self._fresh_gpus(FRESH_GPU_SAMPLE_SECONDS)
        host = self._host.read()
        samples, errors = self._gpu_samples()
        present = [sample for sample in samples if sample.is_present]
        first = max(present, key=lambda sample: sample.total_gb or 0.0, default=None)
        return ResourceMetrics(
            **vars(host),
            gpu_vram_total_gb=first.total_gb if first else self._none_or_unknown(),
            gpu_vram_available_gb=first.available_gb if first else self._none_or_unknown(),
            gpu_type=first.vendor if first else ("none" if self._samples is not None else None),
            gpus=_renumbered(present),
            probe_errors=[
                printable(line, 512)
                for line in [*errors, *(line for sample in present for line in sample.errors)]
            ],
        )

    def close(self) -> None:
        """Let the GPU thread end; one that hangs in a driver does not keep the process alive."""
        self._stopped = True
        self._wanted.set()

    def _none_or_unknown(self) -> float | None:
        return 0.0 if self._samples is not None else None

    def _gpu_samples(self) -> tuple[list[GpuSample], list[str]]:
        if self._samples is None:
            return [], ["gpus: the drivers have not answered yet"]
        waited = 0.0 if self._taken.is_set() else time.monotonic() - self._asked
        if waited < HUNG_GPU_SAMPLE_SECONDS:
            return self._samples, []
        old = [
            replace(sample, gpus=[_without_use(gpu) for gpu in sample.gpus])
            for sample in self._samples
        ]
        present = any(sample.is_present for sample in old)
        return old, [f"gpus: a driver has not answered for {waited:.0f} s"] if present else []

    async def _fresh_gpus(self, patience_seconds: float) -> None:
        self._taken.clear()
        self._asked = time.monotonic()
        self._wanted.set()
        try:
            async with asyncio.timeout(patience_seconds):
                await self._taken.wait()
        except TimeoutError:
            pass

    def _read_gpus(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stopped:
                return
            self._samples = [_guarded(source) for source in self._sources]
            try:
                self._loop.call_soon_threadsafe(self._taken.set)
            except RuntimeError:  # the loop has ended meanwhile
                return


def _guarded(source: GpuSource) -> GpuSample:
    """Read one source; a bug in it must not cost the others, or the heartbeat."""
    try:
        return source()
    except Exception as error:
        return GpuSample(None, errors=[f"gpus: {type(error).__name__}: {error}"])


def _without_use(gpu: Gpu) -> Gpu:
    return gpu.model_copy(update={"vram_available_gb": None, "utilization_percent": None})


def _renumbered(samples: Sequence[GpuSample]) -> list[Gpu]:
    """Number the cards of all vendors through; each vendor counts its own from 0."""
    gpus = [gpu for sample in samples for gpu in sample.gpus]
    if len(samples) < 2:
        return gpus
    return [gpu.model_copy(update={"index": index}) for index, gpu in enumerate(gpus)]
