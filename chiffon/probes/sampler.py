"""One GPU source in a daemon thread of its own, so that a driver that hangs costs only itself.

The heartbeat takes the last sample, with its age, and never waits. When a driver has not answered
for long, that sample is no longer news: what was free then becomes unknown.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from chiffon.contract.messages import Gpu
from chiffon.probes.sample import GpuSample, printable

HUNG_SECONDS = 15.0
"""A driver that has not answered for so long hangs; a sample this overdue is no longer news."""

GpuSource = Callable[[], GpuSample]


@dataclass(frozen=True)
class Taken:
    """The newest that is known of one vendor.

    Args:
        sample: What was read; empty, with an error, where nothing has been read yet.
        age_seconds: Since that reading began, ``None`` where there is none.
        took_seconds: How long it took, ``None`` where there is none.
    """

    sample: GpuSample
    age_seconds: float | None
    took_seconds: float | None


class Sampler:
    """Reads one source when it is asked to; used from one event loop.

    Args:
        vendor: As ``gpu_type`` names it.
        source: What to call; it may block for ever.
        fresh_seconds: How old a sample may be while all is well.
    """

    def __init__(self, vendor: str, source: GpuSource, fresh_seconds: float) -> None:
        self.vendor = vendor
        self._fresh_seconds = fresh_seconds
        self._source = source
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Event()
        self._taken = asyncio.Event()
        self._sample: tuple[GpuSample, float, float] | None = None
        self._asked: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"{vendor}-probe", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Want a fresh sample; no more than one is on its way."""
        if self._asked is None:
            self._asked = _clock()
            self._taken.clear()
            self._wanted.set()

    async def fresh(self, patience_seconds: float) -> None:
        """Ask for a sample and wait for it, up to that many seconds."""
        self.ask()
        try:
            async with asyncio.timeout(patience_seconds):
                await self._taken.wait()
        except TimeoutError:
            pass

    def latest(self) -> Taken:
        """Return the newest sample. Of a driver that hangs, no more than what cannot change."""
        now = _clock()
        waited = 0.0 if self._asked is None else now - self._asked
        if self._sample is None:
            waiting = f"{self.vendor}: no answer yet, {waited:.0f} s after the first question"
            return Taken(GpuSample(self.vendor, errors=[waiting]), None, None)
        sample, began, took = self._sample
        age = now - began
        is_old = waited > HUNG_SECONDS or age > self._fresh_seconds + HUNG_SECONDS
        if is_old and sample.is_present:
            line = f"{self.vendor}: no answer for {max(waited, age):.0f} s: what is free is unknown"
            sample = replace(
                sample,
                gpus=[_without_use(gpu) for gpu in sample.gpus],
                errors=[*sample.errors, line],
                used={},
            )
        return Taken(sample, age, took)

    def close(self) -> None:
        """Let the thread end; one that hangs in a driver does not keep the process alive."""
        self._stopped = True
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stopped:
                return
            began = _clock()
            sample = self._guarded()
            self._sample = (sample, began, _clock() - began)
            try:
                self._loop.call_soon_threadsafe(self._answered)
            except RuntimeError:  # the loop has ended meanwhile
                return

    def _answered(self) -> None:
        self._asked = None
        self._taken.set()

    def _guarded(self) -> GpuSample:
        try:
            return self._source()
        except Exception as error:
            # A bug in one source must not cost the others, or the heartbeat.
            line = printable(f"{self.vendor}: {type(error).__name__}: {error}")
            return GpuSample(self.vendor, errors=[line])


def _clock() -> float:
    # Unlike the monotonic clock this one goes on while the host sleeps, where there is one.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _without_use(gpu: Gpu) -> Gpu:
    return gpu.model_copy(update={"vram_available_gb": None, "utilization_percent": None})
