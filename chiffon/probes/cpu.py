"""CPU: how busy this host is, and how many whole cores are free for a new job.

A new job is held by every bound at once: the CPUs that are online, those that this process may
run on (affinity, which a cpuset group sets as well), and the quota of every control group from
our own up to the root of the mount. So

    cpu_cores_available = floor(min over bounds(CPUs - CPUs busy inside it) - kept), >= 0

Busy inside the host, or inside the affinity, is what ran on those CPUs since the last reading;
busy inside a group is what the group used. Where a group does not count its own use, all that is
busy on the host is taken for it. Waiting for a disk is idle; load averages are the host's.
"""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from chiffon.errors import ProbeError
from chiffon.probes.cgroup import CpuQuota, cpu_quotas
from chiffon.probes.operator import NOTHING_SAID, OperatorWord
from chiffon.probes.sample import Reading, measured

SHORTEST_WINDOW_SECONDS = 0.2

_JUMP = 2.0
"""How many times more CPU time than can have passed is no longer a matter of when it was looked."""


@dataclass(frozen=True)
class _Counters:
    """Seconds since boot, as the kernel counts them."""

    at: float
    host: tuple[float, float]
    pinned: tuple[float, float] | None
    used_by_group: dict[str, float]


@dataclass(frozen=True)
class _Busy:
    """What was busy between two looks at the counters."""

    seconds: float
    host_percent: float
    pinned_percent: float | None = None
    cpus_by_group: dict[str, float] = field(default_factory=dict)


class CpuProbe:
    """Reads the CPUs; their use is what happened between two readings of one probe.

    psutil's own ``cpu_percent`` keeps its last reading per thread, so that two probes would spoil
    each other's, and a probe that changes threads would always read 0.

    Args:
        root: Where the control groups are looked up; tests pass a tree.
        word: What the operator says.
    """

    def __init__(self, root: Path = Path("/"), word: OperatorWord = NOTHING_SAID) -> None:
        self._root = root
        self._word = word
        self._last: _Counters | None = None
        self._busy: _Busy | None = None
        self._physical: int | None = None

    def read(self) -> list[Reading]:
        """Return the CPU fields. Use is since the last call, so it is unknown at the first."""
        groups = measured("cpu_cores_available", "", lambda: cpu_quotas(self._root))
        quotas = groups.value or []
        percent = measured("cpu_percent", "", lambda: self._percent(quotas))
        window = f", over {self._busy.seconds:.1f} s" if self._busy else ""
        bounds = measured("cpu_cores_available", "", lambda: self._tightest(quotas))
        free, said = bounds.value or (None, "")
        if groups.problem is not None:
            free = None
        loads = measured("cpu_load", "", psutil.getloadavg)
        load_1min, load_5min, _ = loads.value or (None, None, None)
        return [
            _named(percent, "cpu_percent", percent.value, f"/proc/stat{window}"),
            self._read_physical(),
            Reading(
                "cpu_cores_available",
                free,
                said,
                groups.seconds + bounds.seconds,
                is_overridden=self._word.override_cpu_cores is not None,
                problem=groups.problem or bounds.problem,
            ),
            _named(loads, "cpu_load_1min", _rounded(load_1min), "getloadavg(3)"),
            _named(loads, "cpu_load_5min", _rounded(load_5min), "getloadavg(3)"),
        ]

    def forget(self, older_than_seconds: float) -> None:
        """Begin the window of the next reading anew if the last reading is that old."""
        if self._last is not None and time.monotonic() - self._last.at > older_than_seconds:
            self._last = measured("cpu_percent", "", lambda: _look([])).value

    def _read_physical(self) -> Reading:
        if self._word.override_cpu_cores_physical is not None:
            return measured(
                "cpu_cores_physical",
                "CHIFFON_OVERRIDE_CPU_CORES_PHYSICAL",
                lambda: self._word.override_cpu_cores_physical,
                is_overridden=True,
            )
        # Boards and virtual machines that do not tell are asked again; others do not change.
        reading = measured(
            "cpu_cores_physical",
            "psutil.cpu_count(logical=False)",
            lambda: self._physical or psutil.cpu_count(logical=False),
        )
        self._physical = reading.value
        return reading

    def _percent(self, quotas: list[CpuQuota]) -> float | None:
        """Return the busy share of all CPUs since the last reading, 0 to 100.

        Of two readings within 0.2 s the first stands: the kernel counts in hundredths of a
        second, and between two looks a busy host may seem idle.
        """
        last, busy = self._last, self._busy
        self._last = self._busy = None  # what cannot be read is not known from before either
        now = _look(quotas)
        if last is not None and now.at - last.at < SHORTEST_WINDOW_SECONDS:
            self._last, self._busy = last, busy
        else:
            self._last = now
            self._busy = None if last is None else _between(last, now)
        return None if self._busy is None else self._busy.host_percent

    def _tightest(self, quotas: list[CpuQuota]) -> tuple[int | None, str]:
        """Return the cores that are free within the tightest bound, and which bound that is."""
        busy, online = self._busy, psutil.cpu_count()
        if busy is None:
            return None, "unknown until there are two samples of /proc/stat"
        if online is None:
            return None, "psutil.cpu_count() does not tell"
        on_host = busy.host_percent / 100 * online
        if self._word.override_cpu_cores is not None:
            bounds = [(self._word.override_cpu_cores, on_host, "by CHIFFON_OVERRIDE_CPU_CORES")]
        else:
            bounds = [(float(online), on_host, "online")]
            allowed = len(_affinity() or ()) or online
            if allowed < online:
                share = busy.pinned_percent
                inside = on_host if share is None else share / 100 * allowed
                bounds.append((float(allowed), inside, "by affinity"))
            for quota in quotas:
                inside = busy.cpus_by_group.get(quota.source, on_host)
                bounds.append((quota.cpus, inside, f"by {quota.source}"))
        cpus, inside, name = min(bounds, key=lambda bound: bound[0] - bound[1])
        kept = self._word.kept_cpu_cores
        said_kept = f", {kept:g} kept" if kept else ""
        said = f"{cpus:g} CPUs {name}, {inside:.2f} busy{said_kept}"
        return max(math.floor(cpus - inside - kept), 0), said


def _look(quotas: list[CpuQuota]) -> _Counters:
    allowed = _affinity()
    pinned = None
    online = psutil.cpu_count() or 0
    if allowed is not None and len(allowed) < online:
        each = psutil.cpu_times(percpu=True)
        # With CPUs offline the list is not by number.
        if len(each) == online == os.sysconf("SC_NPROCESSORS_CONF"):
            sums = [_total_and_idle(each[cpu]) for cpu in allowed]
            pinned = (sum(one[0] for one in sums), sum(one[1] for one in sums))
    return _Counters(
        at=time.monotonic(),
        host=_total_and_idle(psutil.cpu_times()),
        pinned=pinned,
        used_by_group={
            quota.source: quota.used_seconds for quota in quotas if quota.used_seconds is not None
        },
    )


def _between(last: _Counters, now: _Counters) -> _Busy:
    """Return what was busy between two looks.

    Raises:
        ProbeError: The counters went back, or far ahead: nothing is known of this time.
    """
    seconds, cpus = now.at - last.at, psutil.cpu_count() or 1
    return _Busy(
        seconds=seconds,
        host_percent=_busy_percent(last.host, now.host, seconds * cpus),
        pinned_percent=(
            None
            if last.pinned is None or now.pinned is None
            else _busy_percent(last.pinned, now.pinned, seconds * cpus)
        ),
        cpus_by_group={
            source: _cpus(source, used - last.used_by_group[source], seconds, cpus)
            for source, used in now.used_by_group.items()
            if source in last.used_by_group and seconds > 0
        },
    )


def _busy_percent(last: tuple[float, float], now: tuple[float, float], cpu_seconds: float) -> float:
    """Return the busy share, 0 to 100, of what the counters went on by, idle included.

    They go back, or jump, where a container or a host was moved or resumed: then a share of them
    would be the 0 % or 100 % of nothing.
    """
    elapsed, idled = now[0] - last[0], now[1] - last[1]
    is_moved = elapsed <= 0 or elapsed > _JUMP * cpu_seconds + 1
    # Not by a hair: the counts of idle and of waiting are not taken at one moment.
    slack = max(0.05 * elapsed, 0.1)
    if is_moved or idled < -slack or idled > elapsed + slack:
        raise ProbeError(
            "the kernel's CPU times went back or jumped: unknown until the next reading"
        )
    return round(100 * (1 - min(max(idled / elapsed, 0.0), 1.0)), 1)


def _cpus(source: str, used: float, seconds: float, online: int) -> float:
    """Return how many CPUs a group kept busy.

    Raises:
        ProbeError: Its counter went back, or further ahead than so many CPUs can work.
    """
    if used < 0 or used > _JUMP * seconds * online + 1:
        raise ProbeError(f"the CPU time of {source} went back or jumped: unknown for now")
    return round(used / seconds, 2)


def _total_and_idle(times: Any) -> tuple[float, float]:
    # Linux counts guests' time also as user time; iowait is idle for a new job.
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total, times.idle + getattr(times, "iowait", 0.0)


def _affinity() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def _named(read: Reading, name: str, value: Any, source: str) -> Reading:
    return Reading(name, value, source, read.seconds, problem=read.problem)


def _rounded(load: float | None) -> float | None:
    return None if load is None else round(load, 2)
