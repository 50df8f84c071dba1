"""Control groups: trees as the kernel shows them, and the arithmetic over their levels."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.probes.cgroup import MemoryLimit, cpu_quota, memory_limits

GIB = 2**30
HOST = 64 * GIB
NO_LIMIT_V1 = 9223372036854771712

V2_MOUNT = "30 20 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU_MOUNT = "33 20 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY_MOUNT = "34 20 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory"
V2_HYBRID_MOUNT = "35 20 0:30 / /sys/fs/cgroup/unified rw shared:11 - cgroup2 cgroup2 rw"


def plant(
    root: Path, own: list[str], mounts: list[str], files: dict[str, str] | None = None
) -> Path:
    """Make a tree: what the kernel says of this process, and the files of the groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(own) + "\n")
    (root / "proc/self/mountinfo").write_text("\n".join(mounts) + "\n")
    for name, content in (files or {}).items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_v2_the_smallest_quota_of_all_levels_counts(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        ["0::/user.slice/app.service"],
        [V2_MOUNT],
        {
            "user.slice/app.service/cpu.max": "400000 100000\n",
            "user.slice/cpu.max": "150000 100000\n",
            "cgroup.controllers": "cpu memory\n",
        },
    )

    assert cpu_quota(root) == 1.5


@pytest.mark.parametrize(
    "content", ["max 100000\n", "100000 0\n", "0 100000\n", "", "nonsense\n", "-1 100000\n"]
)
def test_v2_what_is_no_quota_does_not_limit(tmp_path: Path, content: str) -> None:
    root = plant(tmp_path, ["0::/a"], [V2_MOUNT], {"a/cpu.max": content})

    assert cpu_quota(root) is None


def test_v1_quotas_are_read_from_their_own_tree(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        ["5:memory:/m", "4:cpu,cpuacct:/docker/abc"],
        [V1_CPU_MOUNT, V1_MEMORY_MOUNT],
        {
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/docker/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/docker/cpu.cfs_period_us": "100000\n",
        },
    )

    assert cpu_quota(root) == 2.5


def test_v1_a_period_of_zero_does_not_limit(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/a/cpu.cfs_quota_us": "5\n", "cpu,cpuacct/a/cpu.cfs_period_us": "0\n"}
    root = plant(tmp_path, ["4:cpu,cpuacct:/a"], [V1_CPU_MOUNT], files)

    assert cpu_quota(root) is None


def test_hybrid_both_trees_are_looked_at(tmp_path: Path) -> None:
    """As on a host whose controllers are in version 1 and whose version 2 tree has none."""
    root = plant(
        tmp_path,
        ["4:memory:/process", "1:cpu,cpuacct:/limited", "0::/"],
        [V1_CPU_MOUNT, V1_MEMORY_MOUNT, V2_HYBRID_MOUNT],
        {
            "cpu,cpuacct/limited/cpu.cfs_quota_us": "150000\n",
            "cpu,cpuacct/limited/cpu.cfs_period_us": "100000\n",
            "memory/process/memory.limit_in_bytes": f"{8 * GIB}\n",
            "memory/process/memory.usage_in_bytes": f"{5 * GIB}\n",
            "memory/process/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
            "unified/cgroup.procs": "1\n",
        },
    )

    assert cpu_quota(root) == 1.5
    assert memory_limits(HOST, root) == [MemoryLimit(8 * GIB, 4 * GIB)]


def test_in_a_container_the_path_of_the_host_leads_to_the_mounts_root(tmp_path: Path) -> None:
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    root = plant(tmp_path, ["0::/docker/abc"], [mount], {"cpu.max": "50000 100000\n"})

    assert cpu_quota(root) == 0.5


def test_a_path_outside_the_mount_counts_as_its_root(tmp_path: Path) -> None:
    root = plant(tmp_path, ["0::/../elsewhere"], [V2_MOUNT], {"cpu.max": "100000 100000\n"})

    assert cpu_quota(root) == 1.0


def test_memory_of_every_level_that_limits_less_the_cache_that_can_go(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        ["0::/a/b"],
        [V2_MOUNT],
        {
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "100\n",
            "a/memory.max": f"{4 * GIB}\n",
            "a/memory.current": f"{3 * GIB}\n",
            "a/memory.stat": f"anon 5\ninactive_file {2 * GIB}\nactive_file 7\n",
        },
    )

    [limit] = memory_limits(HOST, root)

    assert limit == MemoryLimit(4 * GIB, GIB)
    assert limit.available == 3 * GIB


@pytest.mark.parametrize("limit", [NO_LIMIT_V1, HOST])
def test_a_limit_that_is_not_below_the_hosts_memory_is_none(tmp_path: Path, limit: int) -> None:
    files = {
        "memory/a/memory.limit_in_bytes": f"{limit}\n",
        "memory/a/memory.usage_in_bytes": "5\n",
    }
    root = plant(tmp_path, ["5:memory:/a"], [V1_MEMORY_MOUNT], files)

    assert memory_limits(HOST, root) == []


def test_a_host_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_limits(HOST, tmp_path) == []


def test_a_level_that_cannot_be_read_does_not_limit(tmp_path: Path) -> None:
    root = plant(tmp_path, ["0::/a"], [V2_MOUNT], {"a/cgroup.procs": ""})
    (root / "sys/fs/cgroup/a/cpu.max").mkdir()  # reading it is an error, also for root

    assert cpu_quota(root) is None


levels = st.lists(
    st.none() | st.tuples(st.integers(1_000, 10**6), st.integers(1_000, 10**6)), max_size=5
)


@given(levels)
def test_the_quota_is_the_least_of_all_levels_whatever_they_are(
    tmp_path_factory: pytest.TempPathFactory, quotas: list[tuple[int, int] | None]
) -> None:
    names = ["/".join("g" for _ in range(depth + 1)) for depth in range(len(quotas))]
    root = plant(
        tmp_path_factory.mktemp("tree"),
        [f"0::/{names[-1] if names else ''}"],
        [V2_MOUNT],
        {
            f"{name}/cpu.max": "max 100000\n" if quota is None else f"{quota[0]} {quota[1]}\n"
            for name, quota in zip(names, quotas, strict=True)
        },
    )

    expected = min((quota[0] / quota[1] for quota in quotas if quota), default=None)

    assert cpu_quota(root) == expected
