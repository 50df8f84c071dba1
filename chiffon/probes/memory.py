"""Memory: what may still be allocated, by this host and by the control groups we are in.

    memory_available_gb = min over host and groups(available) - kept, >= 0

Available is MemAvailable on the host, and the limit less the working set in each group from our
own up to the root of the mount; ``memory_percent`` is of the total of whichever has least left.
"""

from pathlib import Path

import psutil

from chiffon.probes.cgroup import memory_limits
from chiffon.probes.operator import NOTHING_SAID, OperatorWord
from chiffon.probes.sample import GIB, Reading, measured, to_gb


def read(root: Path = Path("/"), word: OperatorWord = NOTHING_SAID) -> list[Reading]:
    """Return the memory fields.

    Args:
        root: Where the control groups are looked up; tests pass a tree.
        word: What the operator says. A total that is overridden counts instead of all others;
            what is in use is measured.
    """
    read = measured("memory_available_gb", "/proc/meminfo", lambda: _tightest(root))
    available, total, source = read.value or (None, None, read.source)
    is_overridden = word.override_memory_total_gb is not None
    if available is not None and word.override_memory_total_gb is not None:
        overridden = int(word.override_memory_total_gb * GIB)
        available = max(overridden - (total - available), 0)
        total, source = overridden, f"CHIFFON_OVERRIDE_MEMORY_TOTAL_GB, in use by {source}"
    kept = f", {word.kept_memory_gb:g} GiB kept" if word.kept_memory_gb else ""
    percent = free_gb = None
    if available is not None:
        percent = round(100 * (1 - available / total), 1) if total else 100.0
        free_gb = max(round(to_gb(available) - word.kept_memory_gb, 3), 0.0)
    return [
        Reading("memory_percent", percent, source, read.seconds, is_overridden, read.problem),
        Reading(
            "memory_available_gb", free_gb, source + kept, read.seconds, is_overridden, read.problem
        ),
    ]


def _tightest(root: Path) -> tuple[int, int, str]:
    """Return what is available, of which total, both in bytes, and who says so."""
    host = psutil.virtual_memory()
    bounds = [(min(host.available, host.total), host.total, "MemAvailable of /proc/meminfo")]
    bounds += [(one.available, one.limit, one.source) for one in memory_limits(host.total, root)]
    return min(bounds)
