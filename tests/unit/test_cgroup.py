"""Control groups: trees as the kernel shows them, and the arithmetic over their levels."""

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.probes import memory
from chiffon.probes.cgroup import cpu_quotas, memory_limits
from chiffon.probes.operator import OperatorWord
from chiffon.probes.sample import Reading
from tests.fixtures.trees import plant

GIB = 2**30
HOST = 64 * GIB

V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY_MOUNT = "34 20 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory"

# Each tree: the quotas as (CPUs, CPU seconds used), and the limits as (limit, working set).
TREES = {
    "cgroup-v2-nested": (
        [(4.0, 0.25), (2.5, 5.25)],
        [(20 * GIB, 43 * 2**20), (16 * GIB, 6 * GIB)],
    ),
    "cgroup-v2-no-limit": ([], []),
    "cgroup-v2-container": ([(1.5, 1.25)], [(4 * GIB, GIB)]),
    "cgroup-v2-broken": ([], []),
    "cgroup-v1-container": ([(2.5, 5.25)], [(8 * GIB, 4 * GIB)]),
    "cgroup-v1-no-limit": ([], []),
    "cgroup-hybrid": ([(1.5, None)], [(GIB, 132_562_944 - 80_003_072)]),
    "no-gpu": ([], []),
}


@pytest.mark.parametrize("tree", TREES)
def test_every_level_of_every_version_is_found(tmp_path: Path, tree: str) -> None:
    root = plant(tmp_path, tree)

    quotas, limits = cpu_quotas(root), memory_limits(HOST, root)

    assert [(quota.cpus, quota.used_seconds) for quota in quotas] == TREES[tree][0]
    assert [(limit.limit, limit.used) for limit in limits] == TREES[tree][1]
    sources = [quota.source for quota in quotas] + [limit.source for limit in limits]
    assert all(Path(source).is_file() for source in sources)


def grow(root: Path, own: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """Make a tree: what the kernel says of this process, and the files of the groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(own) + "\n")
    (root / "proc/self/mountinfo").write_text("\n".join(mounts) + "\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def cpus(root: Path) -> float | None:
    return min((quota.cpus for quota in cpu_quotas(root)), default=None)


@pytest.mark.parametrize(
    "content", ["max 100000\n", "100000 0\n", "0 100000\n", "", "nonsense\n", "-1 100000\n"]
)
def test_what_is_no_quota_does_not_limit(tmp_path: Path, content: str) -> None:
    root = grow(tmp_path, ["0::/a"], [V2_MOUNT], {"a/cpu.max": content})

    assert cpus(root) is None


def test_in_a_container_the_path_of_the_host_leads_to_the_mounts_root(tmp_path: Path) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    root = grow(tmp_path, ["0::/docker/abc"], [mount], {"cpu.max": "50000 100000\n"})

    assert cpus(root) == 0.5


def test_a_path_outside_the_mount_counts_as_its_root(tmp_path: Path) -> None:
    root = grow(tmp_path, ["0::/../elsewhere"], [V2_MOUNT], {"cpu.max": "100000 100000\n"})

    assert cpus(root) == 1.0


def test_the_part_of_another_that_is_mounted_as_well_is_not_ours(tmp_path: Path) -> None:
    foreign = "99 20 0:26 /docker/abc /srv/rootfs/cgroup rw - cgroup2 cgroup2 rw"
    root = grow(
        tmp_path,
        ["0::/docker/abcdef"],
        [foreign, V2_MOUNT],
        {"docker/abcdef/cpu.max": "300000 100000\n"},
    )
    (root / "srv/rootfs/cgroup").mkdir(parents=True)
    (root / "srv/rootfs/cgroup/cpu.max").write_text("50000 100000\n")

    assert cpus(root) == 3.0


def test_lines_that_make_no_sense_are_passed_over(tmp_path: Path) -> None:
    root = grow(
        tmp_path,
        ["", "nonsense", "0::/a"],
        ["", "30 20", "30 20 0:26 / /sys - cgroup2", V2_MOUNT],
        {"a/cpu.max": "150000 100000\n"},
    )
    with (root / "proc/self/mountinfo").open("ab") as file:
        file.write(b"99 20 0:50 / /media/\xff\xfe rw - vfat /dev/sdb1 rw\n")

    assert cpus(root) == 1.5


@pytest.mark.parametrize("limit", [9223372036854771712, HOST])
def test_a_limit_that_is_not_below_the_hosts_memory_is_none(tmp_path: Path, limit: int) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": f"{limit}\n",
        "memory/a/memory.usage_in_bytes": "5\n",
    }
    root = grow(tmp_path, ["5:memory:/a"], [V1_MEMORY_MOUNT], files)

    assert memory_limits(HOST, root) == []


levels = st.lists(
    st.none() | st.tuples(st.integers(1_000, 10**6), st.integers(1_000, 10**6)), max_size=5
)


@given(levels)
def test_the_quota_is_the_least_of_all_levels_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory, quotas: list[tuple[int, int] | None]
) -> None:
    names = ["/".join("g" for _ in range(depth + 1)) for depth in range(len(quotas))]
    root = grow(
        tmp_path_factory.mktemp("tree"),
        [f"0::/{names[-1] if names else ''}"],
        [V2_MOUNT],
        {
            f"{name}/cpu.max": "max 100000\n" if quota is None else f"{quota[0]} {quota[1]}\n"
            for name, quota in zip(names, quotas, strict=True)
        },
    )

    expected = min((quota[0] / quota[1] for quota in quotas if quota), default=None)

    assert cpus(root) == expected


# --- Memory, over the host and all levels -----------------------------------------------------

TOTAL, AVAILABLE = 24684084 * 1024, 24196688 * 1024
"""Of the captured host."""


@pytest.fixture
def captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = plant(tmp_path, "cgroup-hybrid")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
    return root


def read(root: Path, word: OperatorWord | None = None) -> tuple[Reading, Reading]:
    percent, available = memory.read(root, word or OperatorWord())
    return percent, available


def test_available_is_the_least_that_host_and_groups_have_left(captured: Path) -> None:
    percent, available = read(captured)

    left = GIB - (132_562_944 - 80_003_072)
    assert available.value == round(left / GIB, 3)
    assert percent.value == round(100 * (1 - left / GIB), 1)
    assert available.source.endswith("memory/agents/chiffon/memory.limit_in_bytes")


def test_where_no_group_limits_it_is_what_the_host_has_left(captured: Path, tmp_path: Path) -> None:
    percent, available = read(tmp_path / "no groups here")

    assert available.value == round(AVAILABLE / GIB, 3)
    assert percent.value == round(100 * (1 - AVAILABLE / TOTAL), 1)
    assert available.source == "MemAvailable of /proc/meminfo"


def test_what_is_kept_for_the_owner_is_not_available(captured: Path) -> None:
    _, available = read(captured, OperatorWord(kept_memory_gb=0.5))
    _, nothing = read(captured, OperatorWord(kept_memory_gb=5.0))

    assert available.value == pytest.approx(0.451)
    assert available.source.endswith("0.5 GiB kept")
    assert nothing.value == 0.0


def test_a_total_that_the_operator_says_counts_instead_and_use_is_still_measured(
    captured: Path,
) -> None:
    percent, available = read(captured, OperatorWord(override_memory_total_gb=4.0))

    used = 132_562_944 - 80_003_072
    assert available.value == round(4.0 - used / GIB, 3)
    assert percent.value == round(100 * used / (4 * GIB), 1)
    assert available.is_overridden
    assert "CHIFFON_OVERRIDE_MEMORY_TOTAL_GB" in available.source


def test_memory_that_cannot_be_read_is_unknown_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))

    percent, available = read(tmp_path)

    assert (percent.value, available.value) == (None, None)
    assert "meminfo" in (available.problem or "")


sizes = st.integers(0, 2**40)


@given(
    groups=st.lists(st.tuples(sizes, sizes, sizes), max_size=4),
    kept=st.floats(0, 100),
)
def test_available_never_exceeds_what_any_level_has_left(
    tmp_path_factory: pytest.TempPathFactory,
    groups: list[tuple[int, int, int]],
    kept: float,
) -> None:
    names = ["/".join("g" for _ in range(depth + 1)) for depth in range(len(groups))]
    files = {}
    for name, (limit, usage, cache) in zip(names, groups, strict=True):
        files[f"{name}/memory.max"] = f"{limit}\n"
        files[f"{name}/memory.current"] = f"{usage}\n"
        files[f"{name}/memory.stat"] = f"inactive_file {cache}\n"
    root = grow(
        tmp_path_factory.mktemp("tree"), [f"0::/{names[-1] if names else ''}"], [V2_MOUNT], files
    )

    percent, available = read(root, OperatorWord(kept_memory_gb=kept))

    total = psutil.virtual_memory().total
    assert 0 <= percent.value <= 100
    for limit, usage, cache in groups:
        if limit < total:
            left = max(limit - max(usage - cache, 0), 0) / GIB
            assert 0 <= available.value <= max(left - kept, 0) + 0.001
