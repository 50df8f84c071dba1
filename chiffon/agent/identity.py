"""Who this agent is, kept in the state folder so that it is the same after every restart.

The id is random and not made from the host name: names are reused and copied. The incarnation
only grows, also when the clock was set back between two starts.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from chiffon.errors import BadConfiguration

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

    Raises:
        BadConfiguration: Another process is that agent now, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise BadConfiguration(
            f"the state folder {folder} cannot be used: {error.strerror}; "
            "set CHIFFON_STATE_DIR to a folder that this user may write"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadConfiguration(
                f"another agent runs on the state folder {folder}; a second one on this host "
                "needs its own CHIFFON_STATE_DIR"
            ) from None
        identity = _next(peek(folder))
        try:
            _write(folder / FILE, identity)
        except OSError as error:
            raise BadConfiguration(f"cannot write {folder / FILE}: {error.strerror}") from None
        yield identity


def peek(folder: Path) -> Identity | None:
    """Return the identity kept in a state folder, without being it; ``None`` if there is none.

    Raises:
        BadConfiguration: The file is there and is not what we wrote.
    """
    path = folder / FILE
    try:
        kept = json.loads(path.read_text())
        return Identity(UUID(kept["agent_id"]), int(kept["incarnation"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise BadConfiguration(
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


def _write(path: Path, identity: Identity) -> None:
    """Replace the file as a whole: after a power cut it is the old one or the new one."""
    text = json.dumps({"agent_id": str(identity.agent_id), "incarnation": identity.incarnation})
    temporary = path.with_suffix(".new")
    with temporary.open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
