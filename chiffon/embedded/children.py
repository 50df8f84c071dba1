"""Child processes that end with us, whatever ends us.

The kernel sends a child its death signal when the thread that started it ends
(``PR_SET_PDEATHSIG``, see prctl(2)), also when that was by SIGKILL. Children have a connection of
their own, so Ctrl-C in the terminal reaches only us and we can stop them in order.
"""

import asyncio
import ctypes
import os
import pwd
import random
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chiffon.errors import ChildFailed

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


_SERVER_PORTS = (20_000, 32_000)


@dataclass
class Child:
    """A running child process. Made by ``start``."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    @classmethod
    async def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        death_signal: signal.Signals,
        user: str | None = None,
        folder: Path | None = None,
        files: Sequence[int] = (),
    ) -> "Child":
        """Start a process.

        Args:
            name: For messages.
            argv: The program and its arguments.
            log: Its standard output and error, appended.
            environment: All of its environment.
            death_signal: What the kernel sends it if we die.
            user: Run as this user; only root may say so.
            folder: Its working folder.
            files: Descriptors of ours that it gets, by the same numbers.

        Raises:
            ChildFailed: The program cannot be started.
        """
        owner = pwd.getpwnam(user) if user is not None else None
        with log.open("ab") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    cwd=folder,
                    pass_fds=files,
                    start_new_session=True,
                    preexec_fn=tie_to(os.getpid(), death_signal),
                    user=owner.pw_uid if owner else None,
                    group=owner.pw_gid if owner else None,
                    extra_groups=[] if owner else None,
                )
            except OSError as error:
                raise ChildFailed(f"cannot start {name}: {error}") from None
        return cls(name, process, log)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.returncode is None

    async def ended(self) -> ChildFailed:
        """Wait until it ends, and return that as an error that shows its last words."""
        code = await self.process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return ChildFailed(f"{self.name} ended ({how})\n{self.last_words()}")

    def last_words(self, lines: int = 15) -> str:
        """Return the end of its log, with where the rest is."""
        try:
            end = self.log.read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            end = []
        return "\n".join([f"last lines of {self.log}:", *(f"  {line}" for line in end)])

    async def stop(self, how: signal.Signals, patience_seconds: float) -> int:
        """Ask it to end, and after ``patience_seconds`` make it.

        Returns:
            Its exit code; negative: the signal that ended it.
        """
        with suppress(ProcessLookupError):
            self.process.send_signal(how)
        try:
            async with asyncio.timeout(patience_seconds):
                return await self.process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            return await self.process.wait()


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on now.

    Below those that the kernel gives to outgoing connections (from 32768): one of them would be
    taken before a server that starts for seconds gets to it.
    """
    while True:
        port = random.randrange(*_SERVER_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def unprivileged_user() -> str | None:
    """Return the user to run a server as that refuses root; ``None`` if we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def tie_to(parent: int, death_signal: signal.Signals) -> Callable[[], None]:
    """Return a ``preexec_fn`` by which a child ends with the process ``parent``, our own."""

    def before_exec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # we died between fork and here
            os._exit(1)

    return before_exec
