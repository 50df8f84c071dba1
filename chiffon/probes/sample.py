"""What the probes return: readings of the host, and samples of the GPUs of one vendor."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chiffon.contract.messages import Gpu
from chiffon.errors import ProbeError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Reading:
    """One value, and where it is from.

    Args:
        name: The field of ``ResourceMetrics``.
        value: ``None`` where it cannot be known.
        source: The file, the call or the setting that says so.
        seconds: How long it took to read.
        is_overridden: Whether the operator said it, not the host.
        problem: Why it could not be read, one line.
    """

    name: str
    value: Any
    source: str
    seconds: float
    is_overridden: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class GpuSample:
    """The cards of one vendor.

    Args:
        vendor: As ``gpu_type`` names it.
        gpus: In the driver's order; empty where there are none, or none could be read.
        errors: One line each for what is present and could not be read.
        notes: One line each for what is present and left out on purpose.
        source: The files or the call that the values are from.
        used: Bytes by process, of each GPU by its UUID; of those only whose driver tells.
    """

    vendor: str
    gpus: list[Gpu] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = ""
    used: dict[str, dict[int, int | None]] = field(default_factory=dict)

    @property
    def is_present(self) -> bool:
        """Whether the host has hardware of this vendor that counts, readable or not."""
        return bool(self.gpus or self.errors)


def measured(
    name: str, source: str, read: Callable[[], Any], *, is_overridden: bool = False
) -> Reading:
    """Read one value and take the time; what cannot be read is unknown, with the reason."""
    value, problem = None, None
    began = time.perf_counter()
    try:
        value = read()
    except Exception as error:
        # Whatever goes wrong in one probe must not cost the others, or the heartbeat.
        problem = printable(f"{name}: {error or type(error).__name__}")
    return Reading(name, value, source, time.perf_counter() - began, is_overridden, problem)


def to_gb(size_bytes: float) -> float:
    """Return GiB, to the nearest thousandth (about 1 MiB)."""
    return round(size_bytes / GIB, 3)


def printable(said: str, longest: int = 255) -> str:
    """Return what a driver said as the wire contract takes it: printable, on one line."""
    return "".join(letter if letter.isprintable() else " " for letter in said)[:longest]


def text(path: Path) -> str | None:
    """Return what a one-line file says, ``None`` where the kernel does not have that file.

    Raises:
        ProbeError: It is there and cannot be read.
    """
    try:
        return printable(path.read_text(errors="replace").strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ProbeError(f"{path}: {error.strerror or error}") from None


def number(path: Path) -> int | None:
    """Return the number in a one-line file, ``None`` where the kernel does not have that file.

    Raises:
        ProbeError: It is there and is not a number.
    """
    content = text(path)
    if content is None:
        return None
    try:
        return int(content, 0)
    except ValueError:
        raise ProbeError(f"{path}: {content[:32]!r} is not a number") from None
