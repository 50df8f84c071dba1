"""How many whole cores are free, from the kernel's counters."""

import os
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.probes import cpu
from chiffon.probes.cgroup import CpuQuota
from chiffon.probes.cpu import CpuProbe
from chiffon.probes.operator import OperatorWord
from chiffon.probes.sample import Reading
from tests.fixtures.trees import plant

Times = namedtuple("Times", "user system idle iowait guest")


class Host:
    """A host's counters: what they say is what the test lets happen."""

    def __init__(self, cpus: int) -> None:
        self.now = 1_000.0
        self.busy = [0.0] * cpus
        self.idle = [0.0] * cpus
        self.allowed = set(range(cpus))
        self.configured = cpus
        self.quotas: dict[str, tuple[float, float | None]] = {}

    def run(
        self, seconds: float, busy: list[float], groups: dict[str, float] | None = None
    ) -> None:
        """Let time pass with each CPU busy for a share of it, and groups using CPUs."""
        self.now += seconds
        for index, share in enumerate(busy):
            self.busy[index] += seconds * share
            self.idle[index] += seconds * (1 - share)
        for source, cpus in (groups or {}).items():
            quota, used = self.quotas[source]
            self.quotas[source] = (quota, (used or 0.0) + cpus * seconds)

    def cpu_times(self, percpu: bool = False) -> Any:
        each = [
            Times(busy, 0.0, idle, 0.0, 0.0)
            for busy, idle in zip(self.busy, self.idle, strict=True)
        ]
        if percpu:
            return each
        return Times(*(sum(column) for column in zip(*each, strict=True)))

    def cpu_quotas(self, _: Path) -> list[CpuQuota]:
        return [CpuQuota(cpus, used, source) for source, (cpus, used) in self.quotas.items()]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host of eight CPUs that has done nothing yet."""
    host = Host(8)
    monkeypatch.setattr(psutil, "cpu_times", host.cpu_times)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: host.allowed)
    monkeypatch.setattr(os, "sysconf", lambda _: host.configured)
    monkeypatch.setattr(cpu, "cpu_quotas", host.cpu_quotas)
    monkeypatch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda: host.now))
    return host


def reading(probe: CpuProbe, name: str) -> Reading:
    return next(one for one in probe.read() if one.name == name)


def free(probe: CpuProbe) -> int | None:
    cores: int | None = reading(probe, "cpu_cores_available").value
    return cores


def test_use_is_unknown_until_there_are_two_samples(host: Host) -> None:
    probe = CpuProbe()

    first = probe.read()
    host.run(5, [0.5] * 8)
    second = probe.read()

    assert [one.value for one in first if one.name in ("cpu_percent", "cpu_cores_available")] == [
        None,
        None,
    ]
    assert {one.name: one.value for one in second}["cpu_percent"] == 50.0


def test_waiting_for_a_disk_is_idle_and_guests_are_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = [Times(10, 0, 10, 0, 0), Times(11, 0.5, 10, 0.5, 1)]
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(psutil, "cpu_times", lambda: readings.pop(0))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    probe = CpuProbe()
    probe.read()

    assert reading(probe, "cpu_percent").value == 75.0


def test_two_readings_close_together_do_not_make_a_busy_host_look_idle(host: Host) -> None:
    probe = CpuProbe()
    probe.read()
    host.run(1, [1.0] * 8)
    assert reading(probe, "cpu_percent").value == 100.0

    host.run(0.05, [0.0] * 8)

    assert reading(probe, "cpu_percent").value == 100.0


def test_two_probes_do_not_spoil_each_others_readings(host: Host) -> None:
    one, other = CpuProbe(), CpuProbe()
    one.read()
    host.run(2, [1.0] * 8)
    other.read()
    host.run(2, [0.0] * 8)

    assert reading(one, "cpu_percent").value == 50.0
    assert reading(other, "cpu_percent").value == 0.0


@pytest.mark.parametrize(("busy", "cores"), [(0.0, 8), (0.25, 6), (0.26, 5), (0.999, 0), (1.0, 0)])
def test_free_cores_are_whole_and_never_below_zero(host: Host, busy: float, cores: int) -> None:
    probe = CpuProbe()
    probe.read()
    host.run(10, [busy] * 8)

    assert free(probe) == cores


def test_affinity_bounds_what_is_free_and_only_its_own_cpus_count(host: Host) -> None:
    host.allowed = {6, 7}
    probe = CpuProbe()
    probe.read()
    host.run(10, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.0])

    one = reading(probe, "cpu_cores_available")

    assert one.value == 1
    assert one.source == "2 CPUs by affinity, 0.50 busy"


def test_with_cpus_offline_all_that_is_busy_counts_against_affinity(host: Host) -> None:
    host.allowed, host.configured = {2, 4, 6}, 16
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.25] * 8)

    assert reading(probe, "cpu_cores_available").source == "3 CPUs by affinity, 2.00 busy"


def test_the_window_does_not_reach_back_over_hours_without_a_reading(host: Host) -> None:
    probe = CpuProbe()
    probe.read()
    host.run(7_200, [1.0] * 8)
    probe.forget(older_than_seconds=7.5)
    host.run(5, [0.0] * 8)
    probe.forget(older_than_seconds=7.5)

    assert reading(probe, "cpu_percent").value == 0.0


def test_quotas_that_cannot_be_read_leave_the_free_cores_unknown(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> list[CpuQuota]:
        raise PermissionError(13, "Permission denied", "/sys/fs/cgroup")

    monkeypatch.setattr(cpu, "cpu_quotas", fails)
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.0] * 8)

    cores = reading(probe, "cpu_cores_available")

    assert cores.value is None
    assert "/sys/fs/cgroup" in (cores.problem or "")


def test_a_quota_bounds_what_is_free_and_only_the_groups_own_use_counts(host: Host) -> None:
    host.quotas = {"/own": (4.0, 0.0), "/parent": (6.0, 0.0)}
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.5] * 8, groups={"/own": 0.5, "/parent": 3.5})

    one = reading(probe, "cpu_cores_available")

    # 8 - 4 on the host, 4 - 0.5 in the own group, 6 - 3.5 in its parent.
    assert one.value == 2
    assert one.source == "6 CPUs by /parent, 3.50 busy"


def test_a_group_that_does_not_count_its_use_is_charged_with_all_that_is_busy(host: Host) -> None:
    host.quotas = {"/own": (4.0, None)}
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.25] * 8)

    assert free(probe) == 2


def test_a_quota_that_is_set_later_is_seen(host: Host) -> None:
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.0] * 8)
    assert free(probe) == 8

    host.quotas = {"/own": (1.5, 7.0)}

    assert free(probe) == 1


def test_the_operator_may_keep_cores_and_say_how_many_there_are(host: Host) -> None:
    host.quotas = {"/own": (2.0, 0.0)}
    word = OperatorWord(override_cpu_cores=6.0, kept_cpu_cores=1.5, override_cpu_cores_physical=3)
    probe = CpuProbe(word=word)
    probe.read()
    host.run(10, [0.25] * 8)

    cores = reading(probe, "cpu_cores_available")
    physical = reading(probe, "cpu_cores_physical")

    assert (cores.value, cores.is_overridden) == (2, True)
    assert cores.source == "6 CPUs by CHIFFON_OVERRIDE_CPU_CORES, 2.00 busy, 1.5 kept"
    assert (physical.value, physical.is_overridden) == (3, True)


def test_cores_that_are_kept_are_not_free(host: Host) -> None:
    probe = CpuProbe(word=OperatorWord(kept_cpu_cores=7.5))
    probe.read()
    host.run(10, [0.0] * 8)

    assert free(probe) == 0


def test_what_the_kernel_does_not_tell_is_unknown(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    probe = CpuProbe()
    probe.read()
    host.run(10, [0.0] * 8)

    values = {one.name: one.value for one in probe.read()}

    assert (values["cpu_cores_physical"], values["cpu_cores_available"]) == (None, None)


def test_counters_that_cannot_be_read_are_unknown_with_a_reason_and_cost_only_themselves(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise PermissionError(13, "Permission denied", "/proc/stat")

    probe = CpuProbe()
    probe.read()
    host.run(10, [0.0] * 8)
    assert free(probe) == 8
    monkeypatch.setattr(psutil, "cpu_times", fails)

    readings = {one.name: one for one in probe.read()}

    assert readings["cpu_percent"].value is None
    assert readings["cpu_cores_available"].value is None
    assert "/proc/stat" in (readings["cpu_percent"].problem or "")
    assert readings["cpu_load_1min"].value is not None


@given(
    busy=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    quotas=st.lists(st.floats(0.1, 20), max_size=4),
    allowed=st.sets(st.integers(0, 7), min_size=1),
    kept=st.floats(0, 10),
)
def test_no_bound_is_ever_exceeded(
    busy: list[float], quotas: list[float], allowed: set[int], kept: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        host = Host(8)
        host.allowed = allowed
        host.quotas = {f"/{index}": (cpus, 0.0) for index, cpus in enumerate(quotas)}
        patch.setattr(psutil, "cpu_times", host.cpu_times)
        patch.setattr(psutil, "cpu_count", lambda logical=True: 8)
        patch.setattr(os, "sched_getaffinity", lambda _: host.allowed)
        patch.setattr(os, "sysconf", lambda _: host.configured)
        patch.setattr(cpu, "cpu_quotas", host.cpu_quotas)
        patch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda: host.now))
        probe = CpuProbe(word=OperatorWord(kept_cpu_cores=kept))
        probe.read()
        host.run(100, busy)

        cores = free(probe)

    assert cores is not None
    rounding = 0.01
    assert cores >= 0
    idle_on_host = 8 - sum(busy)
    idle_inside = sum(1 - busy[index] for index in allowed)
    for bound in (idle_on_host, idle_inside, *quotas):
        assert cores <= max(bound - kept, 0) + rounding


def test_a_captured_host_is_read_from_its_own_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plant(tmp_path, "cgroup-hybrid")
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(cpu, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    probe = CpuProbe(root)
    probe.read()
    stat = root / "proc/stat"
    # Two CPUs for ten seconds, one of them busy for seven.
    stat.write_text(stat.read_text().replace("225734 1 110606 2171476", "226434 1 110606 2172776"))

    readings = {one.name: one for one in probe.read()}

    assert readings["cpu_percent"].value == 35.0
    assert readings["cpu_cores_available"].value == 0  # a quota of 1.5, and 0.7 in use
    assert readings["cpu_cores_available"].source.startswith("1.5 CPUs by ")
    assert readings["cpu_cores_available"].source.endswith("cpu.cfs_quota_us, 0.70 busy")


def test_the_load_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (1.234, 0.5, 0.1))

    values = {one.name: one.value for one in CpuProbe().read()}

    assert (values["cpu_load_1min"], values["cpu_load_5min"]) == (1.23, 0.5)


MOVED = [-1_000.0, -0.5, 50_000.0]
"""Seconds by which the counters jump as a container or a host is moved, resumed or restored."""


@pytest.mark.parametrize("jump", MOVED)
@pytest.mark.parametrize("which", ["busy", "idle"])
def test_counters_that_jump_are_unknown_for_one_reading(
    host: Host, jump: float, which: str
) -> None:
    probe = CpuProbe()
    probe.read()
    host.run(5, [0.5] * 8)
    assert free(probe) == 4

    host.run(0.5 if jump > -1 else 5, [0.0 if which == "idle" else 1.0] * 8)
    counters = getattr(host, which)
    counters[:] = [one + jump * (2 if jump > -1 and jump < 0 else 1) for one in counters]
    during = {one.name: one for one in probe.read()}
    host.run(5, [0.25] * 8)

    assert during["cpu_percent"].value is None
    assert during["cpu_cores_available"].value is None
    assert "went back or jumped" in (during["cpu_percent"].problem or "")
    assert reading(probe, "cpu_percent").value == 25.0


def test_counters_that_stand_still_are_unknown_and_not_idle(host: Host) -> None:
    probe = CpuProbe()
    probe.read()

    host.now += 5

    assert reading(probe, "cpu_percent").value is None


@pytest.mark.parametrize("jump", MOVED)
def test_a_groups_counter_that_jumps_is_unknown_for_one_reading(host: Host, jump: float) -> None:
    host.quotas["cpu.max"] = (4.0, 2_000.0)
    probe = CpuProbe()
    probe.read()
    host.run(5, [0.5] * 8, {"cpu.max": 1.0})
    assert free(probe) == 3

    host.quotas["cpu.max"] = (4.0, 2_005.0 + jump)
    host.run(5, [0.5] * 8)
    during = reading(probe, "cpu_cores_available")
    host.run(5, [0.5] * 8, {"cpu.max": 2.0})

    assert during.value is None
    assert free(probe) == 2
