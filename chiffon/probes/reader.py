"""All probes together, as the ``resources`` of one heartbeat."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from chiffon.contract.messages import Observed, ResourceMetrics
from chiffon.probes import amd, intel, memory
from chiffon.probes.cpu import CpuProbe
from chiffon.probes.gpus import GpuReadings, combine
from chiffon.probes.jobs import Jobs
from chiffon.probes.nvidia import NvidiaProbe
from chiffon.probes.operator import NOTHING_SAID, OperatorWord
from chiffon.probes.sample import Reading
from chiffon.probes.sampler import GpuSource, Sampler

log = logging.getLogger(__name__)

FIRST_CPU_SAMPLE_SECONDS = 0.25
FIRST_GPU_SAMPLE_SECONDS = 2.0
LONGEST = 1.5
"""In intervals, the most that lies between two samples."""


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
        interval_seconds: Between two readings; GPU samples are taken shortly before each.
        word: What the operator says of this host.
        sources: What to ask for GPUs, by vendor.
        root: Where ``/proc`` and the control groups are.
        state_folder: Where processes are tied to reservations.
    """

    def __init__(
        self,
        interval_seconds: float,
        word: OperatorWord,
        sources: Mapping[str, GpuSource],
        root: Path,
        state_folder: Path | None = None,
    ) -> None:
        self._interval = interval_seconds
        self._word = word
        self._root = root
        self._cpu = CpuProbe(root, word)
        self._jobs = Jobs(state_folder)
        self._samplers = [
            Sampler(vendor, source, LONGEST * interval_seconds)
            for vendor, source in sources.items()
        ]
        self._loop = asyncio.get_running_loop()
        self._asked = self._loop.time()
        self._next = self._loop.call_later(interval_seconds, self._ask)
        self.readings: list[Reading] = []
        self.notes: list[str] = []

    @classmethod
    async def open(
        cls,
        interval_seconds: float = 5.0,
        word: OperatorWord = NOTHING_SAID,
        sources: Mapping[str, GpuSource] | None = None,
        root: Path = Path("/"),
        state_folder: Path | None = None,
    ) -> Self:
        """Start to read: two CPU samples 0.25 s apart, and the first of the GPUs.

        A first GPU sample may take seconds where the driver has to load; after 2 s we go on.
        """
        asked = gpu_sources(root, word) if sources is None else sources
        reader = cls(interval_seconds, word, asked, root, state_folder)
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
        host = [*self._cpu.read(), *memory.read(self._root, self._word)]
        gpus = combine(
            [sampler.latest() for sampler in self._samplers],
            self._word,
            memory_available_gb=host[-1].value,
        )
        self.readings, self.notes = [*host, *gpus.scalars], gpus.notes
        self._ask_before_the_next()
        problems = dict.fromkeys(one.problem for one in host if one.problem is not None)
        return ResourceMetrics(
            **{one.name: one.value for one in self.readings},
            gpus=gpus.gpus,
            probe_errors=[*problems, *gpus.errors][:64],
            gpu_sample_age_seconds=gpus.sample_age_seconds,
            overridden=[one.name for one in self.readings if one.is_overridden],
            kept=self._word.kept,
            observed=self._observed(gpus),
        )

    def _observed(self, gpus: GpuReadings) -> list[Observed]:
        try:
            return self._jobs.observe(gpus.gpus, gpus.used)
        except Exception:
            # Whose processes they are is not worth the other readings.
            log.exception("what tied processes use cannot be read")
            return []

    def close(self) -> None:
        """Stop asking; a GPU source that hangs does not keep the process alive."""
        self._next.cancel()
        for sampler in self._samplers:
            sampler.close()

    def _ask_before_the_next(self) -> None:
        """Have the next sample taken shortly before the next reading is due, also an early one.

        Readings out of turn may put it off, but not for ever.
        """
        ahead = max(self._interval * 0.9 - 0.25, self._interval / 2)
        latest = self._asked + LONGEST * self._interval
        self._next.cancel()
        self._next = self._loop.call_at(min(self._loop.time() + ahead, latest), self._ask)

    def _ask(self) -> None:
        """Ask for samples, and go on asking while nobody reads.

        The first reading after the broker was away shall tell of the present.
        """
        self._asked = self._loop.time()
        self._next = self._loop.call_later(self._interval, self._ask)
        self._cpu.forget(older_than_seconds=LONGEST * self._interval)
        for sampler in self._samplers:
            sampler.ask()
