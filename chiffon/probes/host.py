"""CPU, memory and load of this host, from psutil and from the control groups we are in."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from chiffon.probes.cgroup import cpu_quota, memory_limits
from chiffon.probes.sample import to_gb

SHORTEST_WINDOW_SECONDS = 0.2


@dataclass(frozen=True)
class HostSample:
    """One look at the host; ``None`` where it cannot be known."""

    cpu_percent: float | None
    cpu_cores_physical: int | None
    cpu_cores_available: int | None
    cpu_load_1min: float | None
    cpu_load_5min: float | None
    memory_percent: float | None
    memory_available_gb: float | None


class HostProbe:
    """Reads the host; CPU use is what happened between two readings of one probe.

    Args:
        root: Where the control groups are looked up; tests pass a tree.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._last: tuple[float, float] | None = None
        self._busy_percent: float | None = None

    def read(self) -> HostSample:
        """Return what is free now. CPU use is since the last call, so unknown at the first."""
        busy = self._cpu_percent()
        load = psutil.getloadavg()
        memory_percent, memory_available_gb = self._memory()
        return HostSample(
            cpu_percent=busy,
            cpu_cores_physical=psutil.cpu_count(logical=False),
            cpu_cores_available=free_cores(busy, psutil.cpu_count(), usable_cpus(self._root)),
            cpu_load_1min=round(load[0], 2),
            cpu_load_5min=round(load[1], 2),
            memory_percent=memory_percent,
            memory_available_gb=memory_available_gb,
        )

    def _memory(self) -> tuple[float, float]:
        """Return how much memory is used, in per cent, and how much is available, in GiB.

        Available is the least of what the host has left (MemAvailable) and what each group we
        are in has left; the percentage is of the memory of whichever that is.
        """
        host = psutil.virtual_memory()
        left = [(host.available, host.total)]
        left += [(one.available, one.limit) for one in memory_limits(host.total, self._root)]
        available, total = min(left)
        percent = 100 * (1 - available / total) if total else 100.0
        return round(min(max(percent, 0.0), 100.0), 1), to_gb(available)

    def _cpu_percent(self) -> float | None:
        """Return the busy share of all CPUs since the last reading, 0 to 100.

        Of two readings within 0.2 s the first stands: the kernel counts in hundredths of a
        second, and between two looks a busy host may seem idle. psutil's own ``cpu_percent``
        keeps its last reading per thread, so that two probes would spoil each other's.
        """
        times = psutil.cpu_times()
        # Linux counts guests' time also as user time; iowait is idle for a new job.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        if self._last is None:
            self._last = (total, idle)
            return None
        elapsed, idled = total - self._last[0], idle - self._last[1]
        if elapsed >= SHORTEST_WINDOW_SECONDS * (psutil.cpu_count() or 1):
            self._last = (total, idle)
            share = 1 - min(max(idled / elapsed, 0.0), 1.0)
            self._busy_percent = round(100 * share, 1)
        return self._busy_percent


def usable_cpus(root: Path = Path("/")) -> float:
    """Return how many CPUs this process may use, possibly a fraction.

    The least of the CPUs that are online, those it is allowed to run on (affinity), and every
    quota of the control groups it is in.
    """
    allowed = float(len(os.sched_getaffinity(0)))
    quota = cpu_quota(root)
    return min(allowed, psutil.cpu_count() or allowed, allowed if quota is None else quota)


def free_cores(busy_percent: float | None, online: int | None, usable: float) -> int | None:
    """Return how many whole cores are free for a new job.

    floor(usable CPUs - busy CPUs), at least 0: what is busy on the host may be busy on any of
    the CPUs that this process may use.

    Args:
        busy_percent: Busy share of all online CPUs, 0 to 100; ``None`` if unknown.
        online: Online logical CPUs of the host; ``None`` if unknown.
        usable: CPUs this process may use, possibly a fraction of one.
    """
    if busy_percent is None or online is None:
        return None
    return max(math.floor(usable - busy_percent / 100 * online), 0)
