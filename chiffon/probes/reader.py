"""All probes together, as the ``resources`` of one heartbeat."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from chiffon.messages import ResourceMetrics
from chiffon.probes import amd, intel, memory
from chiffon.probes.cpu import CpuProbe
from chiffon.probes.gpus import combine
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.operator import NOTHING_SAID, OperatorWord
from chiffon.probes.sample import Reading
from chiffon.probes.sampler import GpuSource, Sampler

FIRST_CPU_SAMPLE_SECONDS = 0.25
FIRST_GPU_SAMPLE_SECONDS = 2.0


def gpu_sources(root: Path = Path("/"), word: OperatorWord = NOTHING_SAID) -> dict[str, GpuSource]:
    """Return a source for each vendor we can read; none where the operator says there is none."""
    if word.override_gpu_type == "none":
        return {}
    return {
        "nvidia": NvidiaProbe(root).read,
        "amd": amd.probe(root, word.integrated_gpus).read,
        "intel": intel.probe(root, word.integrated_gpus).read,
    }


class Reader:
    """Reads this host for heartbeats; made by ``open``, used from one event loop.

    Args:
        interval_seconds: Between two readings; GPU samples are taken shortly before.
        word: What the operator says of this host.
        sources: What to ask for GPUs, by vendor.
        root: Where ``/proc`` and the control groups are.
    """

    def __init__(
        self,
        interval_seconds: float,
        word: OperatorWord,
        sources: Mapping[str, GpuSource],
        root: Path,
    ) -> None:
        # A sample before each heartbeat, so that it is fresh, and in time also for one that
        # comes a little early.
        self._ask_after_seconds = max(interval_seconds * 0.9 - 0.25, interval_seconds / 2)
        self._word = word
        self._root = root
        self._cpu = CpuProbe(root, word)
        self._samplers = [Sampler(vendor, source) for vendor, source in sources.items()]
        self._next: asyncio.TimerHandle | None = None
        self.readings: list[Reading] = []
        self.notes: list[str] = []

    @classmethod
    async def open(
        cls,
        interval_seconds: float = 5.0,
        word: OperatorWord = NOTHING_SAID,
        sources: Mapping[str, GpuSource] | None = None,
        root: Path = Path("/"),
    ) -> Self:
        """Start to read: two CPU samples 0.25 s apart, and the first of the GPUs.

        A first GPU sample may take seconds where the driver has to load; after 2 s we go on.
        """
        asked = gpu_sources(root, word) if sources is None else sources
        reader = cls(interval_seconds, word, asked, root)
        reader._cpu.read()
        await asyncio.gather(
            asyncio.sleep(FIRST_CPU_SAMPLE_SECONDS),
            *(sampler.fresh(FIRST_GPU_SAMPLE_SECONDS) for sampler in reader._samplers),
        )
        return reader

    def read(self) -> ResourceMetrics:
        """Return what the host has free now, ``None`` with a reason for what cannot be read.

        Never waits: of the GPUs it is the last sample, and its age. Afterwards ``readings`` says
        where each value is from, and ``notes`` what was left out on purpose.
        """
        gpus = combine([sampler.latest() for sampler in self._samplers], self._word)
        host = [*self._cpu.read(), *memory.read(self._root, self._word)]
        self.readings, self.notes = [*host, *gpus.scalars], gpus.notes
        self._ask_ahead()
        problems = dict.fromkeys(one.problem for one in host if one.problem is not None)
        return ResourceMetrics(
            **{one.name: one.value for one in self.readings},
            gpus=gpus.gpus,
            probe_errors=[*problems, *gpus.errors][:64],
            gpu_sample_age_seconds=gpus.sample_age_seconds,
            overridden=[one.name for one in self.readings if one.is_overridden],
            reserved=self._word.reserved,
        )

    def close(self) -> None:
        """Stop asking; a GPU source that hangs does not keep the process alive."""
        if self._next is not None:
            self._next.cancel()
        for sampler in self._samplers:
            sampler.close()

    def _ask_ahead(self) -> None:
        if self._next is not None:
            self._next.cancel()
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(self._ask_after_seconds, self._ask)

    def _ask(self) -> None:
        for sampler in self._samplers:
            sampler.ask()
