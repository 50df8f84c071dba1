"""A server process that can be killed, frozen and started again as it was."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from chiffon.embedded.children import tie_to


class Server:
    """A running server.

    Args:
        pid: Of its main process.
        argv: How it is started again.
        environment: All of its environment.
        folder: Its working folder.
        user: Its user's number; default ours.
        group: Its group's number.
    """

    def __init__(
        self,
        pid: int,
        argv: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        user: int | None = None,
        group: int | None = None,
    ) -> None:
        self.pid = pid
        self._argv, self._environment, self._folder = argv, environment, folder
        self._user, self._group = user, group
        self._own: subprocess.Popen[bytes] | None = None

    @classmethod
    def of(cls, pid: int) -> "Server":
        """Return a process as a server that is started again as this one was."""
        process = psutil.Process(pid)
        return cls(
            pid,
            process.cmdline(),
            process.environ(),
            Path(process.cwd()),
            process.uids().effective,
            process.gids().effective,
        )

    @property
    def is_running(self) -> bool:
        """Whether there is such a process."""
        return psutil.pid_exists(self.pid)

    @property
    def is_frozen(self) -> bool:
        """Whether it is stopped, with all that it started and that has not ended."""
        main, *children = self._all()
        # A program that it had just run has ended, and nobody is there to take note of it.
        at_rest = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}
        return main.status() == psutil.STATUS_STOPPED and all(
            one.status() in at_rest for one in children
        )

    def kill(self) -> None:
        """End it, with all that it started, without a chance to tidy up."""
        processes = self._signal(signal.SIGKILL)
        if self._own is not None:
            self._own.wait()
        psutil.wait_procs(processes, timeout=30)
        assert not self.is_running

    def start(self, **environment: str) -> None:
        """Start it again, with more in its environment if you like."""
        self._own = subprocess.Popen(
            self._argv,
            env={**self._environment, **environment},
            cwd=self._folder,
            user=self._user,
            group=self._group,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=tie_to(os.getpid(), signal.SIGKILL),
        )
        self.pid = self._own.pid

    def freeze(self) -> None:
        """Stop it, with all that it started."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End what was started again here."""
        if self._own is not None and self._own.poll() is None:
            self.thaw()
            self.kill()

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        processes = self._all()
        for one in processes:
            with suppress(psutil.NoSuchProcess):  # a child that ended by itself, or with its parent
                one.send_signal(number)
        return processes

    def _all(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, frozen or not."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()
