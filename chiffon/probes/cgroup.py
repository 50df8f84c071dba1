"""What control groups leave of this host to us: CPUs and memory.

Source: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst,
scheduler/sched-bwc.rst (v1 quotas), proc(5) for ``cgroup`` and ``mountinfo``. The own group is
found by what the kernel says of this process, never by a fixed path: on a host with both versions
those paths do not exist. Every level from the own group up to the mount's root may limit; the
smallest counts. Shares and weights are no limits, nor is ``memory.low``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chiffon.errors import ProbeError
from chiffon.probes.sample import number, text

_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class CpuQuota:
    """One group that limits CPU time.

    ``cpus`` may be a fraction. ``used_seconds`` is the CPU time that the group and those below it
    have used so far, ``None`` where it does not count it (version 1 with ``cpuacct`` elsewhere).
    ``source`` is the file that says so.
    """

    cpus: float
    used_seconds: float | None
    source: str


@dataclass(frozen=True)
class MemoryLimit:
    """One group that limits memory; sizes in bytes.

    ``used`` is the working set: usage less the file cache that the kernel would drop first.
    ``source`` is the file that says so.
    """

    limit: int
    used: int
    source: str

    @property
    def available(self) -> int:
        """What may still be allocated in this group, never below 0."""
        return max(self.limit - self.used, 0)


@dataclass(frozen=True)
class _Mount:
    controllers: frozenset[str]
    """Empty for version 2, which has one tree for all."""
    root: str
    point: str


def cpu_quotas(root: Path = Path("/")) -> list[CpuQuota]:
    """Return the quotas that hold for us, from our own group upwards; empty if none does.

    Args:
        root: Where ``/proc`` and the mounted groups are; tests pass a tree.
    """
    return [
        quota
        for level in _levels(root, "cpu")
        if (quota := _quota_v2(level) or _quota_v1(level)) is not None
    ]


def memory_limits(total_bytes: int, root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the groups that limit our memory below what the host has; empty if none does.

    Args:
        total_bytes: Memory of the host; a limit that is not below it is none.
        root: Where ``/proc`` and the mounted groups are; tests pass a tree.
    """
    found = []
    for level in _levels(root, "memory"):
        for limit_name, usage_name in _MEMORY_FILES:
            # "max" is no number, and no limit.
            limit, usage = _number(level / limit_name), _number(level / usage_name)
            if limit is not None and usage is not None and limit < total_bytes:
                used = max(usage - _inactive_file(level), 0)
                found.append(MemoryLimit(limit, used, str(level / limit_name)))
    return found


def _levels(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of our own group and of all above it, in every tree that matters."""
    paths, mounts = _own_paths(root), _mounts(root)
    for path, tree in (
        (paths.get(controller), [mount for mount in mounts if controller in mount.controllers]),
        (paths.get(""), [mount for mount in mounts if not mount.controllers]),
    ):
        if path is not None:
            yield from _up_from(path, tree, root)


def _up_from(path: str, mounts: list[_Mount], root: Path) -> Iterator[Path]:
    # Another's part of the tree may be mounted somewhere as well; ours is where our path leads.
    # A container may see no more than its own part, under a path that the host gave it.
    ours = [mount for mount in mounts if f"{path}/".startswith(f"{mount.root.rstrip('/')}/")]
    for mount in ours or mounts:
        top = root / mount.point.lstrip("/")
        own = top / path.removeprefix(mount.root).strip("/")
        if not own.is_dir() or ".." in own.parts:
            own = top
        while True:
            yield own
            if own == top:
                break
            own = own.parent


def _own_paths(root: Path) -> dict[str, str]:
    """Return our path in each tree, by controller; the tree of version 2 is ``""``."""
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _mounts(root: Path) -> list[_Mount]:
    """Return where groups are mounted: ``mountinfo`` of proc(5), fields 4, 5 and after the dash."""
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        is_v1 = kind[0] == "cgroup"
        controllers = frozenset(kind[2].split(",")) if is_v1 else frozenset[str]()
        mounts.append(_Mount(controllers, fields[3], fields[4].replace("\\040", " ")))
    return mounts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _quota_v2(level: Path) -> CpuQuota | None:
    words = (_text(level / "cpu.max") or "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None  # "max 100000": no quota
    quota, period = (int(word) for word in words)
    if not quota or not period:
        return None
    used = _statistics(level / "cpu.stat").get("usage_usec")
    return CpuQuota(quota / period, None if used is None else used / 1e6, str(level / "cpu.max"))


def _quota_v1(level: Path) -> CpuQuota | None:
    quota = _number(level / "cpu.cfs_quota_us")
    period = _number(level / "cpu.cfs_period_us")
    if not quota or not period or quota < 0 or period < 0:
        return None  # -1: no quota
    used = _number(level / "cpuacct.usage")
    return CpuQuota(
        quota / period, None if used is None else used / 1e9, str(level / "cpu.cfs_quota_us")
    )


def _inactive_file(level: Path) -> int:
    sizes = _statistics(level / "memory.stat")
    # Version 1 counts this group alone, and with its children under another name.
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0))


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.partition(" ") for line in _lines(path))
    return {name: int(count) for name, _, count in pairs if count.isdecimal()}


def _text(path: Path) -> str | None:
    # A level that cannot be read does not limit: better the host's number than none.
    try:
        return text(path)
    except ProbeError:
        return None


def _number(path: Path) -> int | None:
    try:
        return number(path)
    except ProbeError:
        return None
