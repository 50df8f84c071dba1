"""What the processes of a reservation use, for those that were tied to one.

A tie is a file in the state folder, named by the reservation, with one process a line: its number
and when it started, since numbers are used again. Whoever starts a job writes it, by
``chiffon agent tie`` say. What such a process starts belongs to it, as long as it runs.

Source: proc_pid_stat(5) and proc_pid_statm(5), by way of psutil. Memory is that which is not
shared, so that what several processes map is not taken for theirs alone.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import psutil

from chiffon.contract.messages import Gpu, Observed, ObservedGpu
from chiffon.errors import BadConfiguration
from chiffon.probes.sample import to_gb

log = logging.getLogger(__name__)

FOLDER = "reservations"
MOST = 256

Used = Mapping[str, Mapping[int, int | None]]
"""Bytes by process, of each GPU by its UUID whose driver tells; ``None`` if not of that process."""


def tie(folder: Path, reservation_id: UUID, pids: Iterable[int]) -> None:
    """Tie processes of this host to a reservation; those tied before stay so.

    Args:
        folder: The agent's state folder.
        reservation_id: The reservation.
        pids: Of processes that run now.

    Raises:
        BadConfiguration: There is no such process, or the folder cannot be written.
    """
    lines = []
    for pid in pids:
        started = _started(pid)
        if started is None:
            raise BadConfiguration(f"there is no process {pid}")
        lines.append(f"{pid} {started}")
    path = folder / FOLDER / str(reservation_id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.read_text(errors="replace").splitlines() if path.exists() else []
        # At once, as the agent may look at any moment and removes a tie without processes.
        unfinished = path.with_suffix(".new")
        unfinished.write_text("".join(f"{line}\n" for line in dict.fromkeys([*known, *lines])))
        unfinished.replace(path)
    except OSError as error:
        raise BadConfiguration(f"cannot write {folder / FOLDER}: {error.strerror}") from None


def _started(pid: int) -> int | None:
    """Return when a process started, in the kernel's ticks since it booted; ``None`` if it is gone.

    Not as a time of day, which changes for a process that runs when the clock is set.
    """
    try:
        # The name before the last parenthesis may hold anything; this is the 20th field behind it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


class Jobs:
    """The ties of one state folder, and what the processes of each use.

    Args:
        folder: The agent's state folder; ``None``: nothing is ever tied.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._busy: dict[tuple[int, float], float] = {}
        self._looked = time.monotonic()

    def observe(self, gpus: Sequence[Gpu], used: Used) -> list[Observed]:
        """Return what the tied processes use now.

        CPUs are those kept busy since the last call, unknown at the first. A tie of which no
        process is left is removed.

        Args:
            gpus: As the heartbeat lists them.
            used: What the drivers tell of processes.
        """
        tied = dict(list(self._ties())[:MOST])
        seconds, self._looked = time.monotonic() - self._looked, time.monotonic()
        before, self._busy = self._busy, {}
        observed = []
        for reservation_id, processes in tied.items():
            cores, memory = 0.0, 0
            is_known = True
            for one in processes:
                try:
                    key, times = (one.pid, one.create_time()), one.cpu_times()
                    size = one.memory_info()
                except psutil.Error:
                    continue  # it has ended
                self._busy[key] = times.user + times.system
                spent = self._busy[key] - before.get(key, math.inf)
                is_known = is_known and spent >= 0  # a counter may go back as a container moves
                cores += spent / seconds
                memory += max(size.rss - size.shared, 0)
            pids = {one.pid for one in processes}
            observed.append(
                Observed(
                    reservation_id=reservation_id,
                    gpus=[found for gpu in gpus if (found := _of(gpu, used, pids)) is not None],
                    cpu_cores=round(cores, 3) if is_known else None,
                    memory_gb=to_gb(memory),
                )
            )
        return observed

    def _ties(self) -> Iterable[tuple[UUID, list[psutil.Process]]]:
        if self._folder is None:
            return
        try:
            files = sorted(self._folder.iterdir())
        except OSError:
            return
        for path in files:
            try:
                reservation_id = UUID(path.name)
                lines = path.read_text(errors="replace").splitlines()
            except (ValueError, OSError):
                continue
            processes = _running(lines)
            if processes:
                yield reservation_id, processes
            else:
                log.debug("no process of reservation %s is left", reservation_id)
                with suppress(OSError):  # it may be another user's
                    path.unlink()


def _running(lines: Iterable[str]) -> list[psutil.Process]:
    """Return the processes that a tie names, and those that they have started."""
    found: dict[int, psutil.Process] = {}
    for line in lines:
        number, _, started = line.partition(" ")
        try:
            # A number that is used again is another process.
            if not number.isdecimal() or str(_started(int(number))) != started:
                continue
            process = psutil.Process(int(number))
            for one in (process, *process.children(recursive=True)):
                found[one.pid] = one
        except (psutil.Error, ValueError, OverflowError):
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def _of(gpu: Gpu, used: Used, pids: set[int]) -> ObservedGpu | None:
    """Return what these processes use of one GPU; ``None`` if that is nothing."""
    told = used.get(gpu.uuid or "")
    if told is None:
        return ObservedGpu(uuid=gpu.uuid, index=gpu.index, vram_gb=None)
    theirs = [size for pid, size in told.items() if pid in pids]
    if not theirs:
        return None
    known = [size for size in theirs if size is not None]
    size = to_gb(sum(known)) if len(known) == len(theirs) else None
    return ObservedGpu(uuid=gpu.uuid, index=gpu.index, vram_gb=size)
