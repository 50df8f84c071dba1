"""Who this agent is, kept in the state folder so that it is the same after every restart.

The id is random and not made from the host name: names are reused and copied. The incarnation
only grows, also when the clock was set back between two starts.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from chiffon.errors import BadConfiguration, StateUnavailable

log = logging.getLogger(__name__)

FILE = "agent.json"
LOCK = "agent.lock"


@dataclass(frozen=True)
class Identity:
    """An agent's id, and the number of this start of it: unix milliseconds, always growing."""

    agent_id: UUID
    incarnation: int


@contextmanager
def open_identity(folder: Path) -> Iterator[Identity]:
    """Be the agent of this state folder for as long as the context is open.

    Where the folder cannot be written, but is readable as that of an agent, this start of it is
    not kept: the next one is told apart by the clock alone.

    Raises:
        BadConfiguration: Another process is that agent now.
        StateUnavailable: The folder cannot be used now, and holds no agent that could be read.
    """
    with ExitStack() as stack:
        trouble = _lock(folder, stack)
        kept = peek(folder)
        identity = _next(kept)
        if trouble is None:
            trouble = _write(folder / FILE, identity)
        if trouble is not None and kept is None:
            raise StateUnavailable(
                f"the state folder {folder} cannot be used: {trouble}; mend that, or set "
                "CHIFFON_STATE_DIR to a folder that this user may write"
            )
        if trouble is not None:
            log.warning("the state folder %s cannot be written: %s", folder, trouble)
        yield identity


def _lock(folder: Path, stack: ExitStack) -> str | None:
    """Lock the folder until the stack is closed; return why that cannot be done, if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / LOCK).open("a"))
    except OSError as error:
        return error.strerror or str(error)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadConfiguration(
            f"another agent runs on the state folder {folder}; a second one on this host "
            "needs its own CHIFFON_STATE_DIR"
        ) from None
    except OSError as error:
        return f"it cannot be locked: {error.strerror}"
    return None


def peek(folder: Path) -> Identity | None:
    """Return the identity kept in a state folder, without being it; ``None`` if there is none.

    Raises:
        StateUnavailable: The file is there and cannot be read, or is not what we wrote.
    """
    path = folder / FILE
    try:
        kept = json.loads(path.read_text())
        return Identity(UUID(kept["agent_id"]), int(kept["incarnation"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise StateUnavailable(
            f"{path} is not readable as an agent's identity ({error}); mend it, or delete it to "
            "become a new agent"
        ) from None


def fresh() -> Identity:
    """Return the identity of an agent that keeps no state."""
    return _next(None)


def _next(kept: Identity | None) -> Identity:
    now = int(time.time() * 1_000)
    if kept is None:
        return Identity(uuid4(), now)
    return Identity(kept.agent_id, max(now, kept.incarnation + 1))


def _write(path: Path, identity: Identity) -> str | None:
    """Replace the file as a whole: after a power cut it is the old one or the new one.

    Returns:
        Why it could not be written, if so.
    """
    text = json.dumps({"agent_id": str(identity.agent_id), "incarnation": identity.incarnation})
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        return error.strerror or str(error)
    return None
