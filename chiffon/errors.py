"""Every exception chiffon raises on purpose.

* ChiffonError
    * BadMessage             a body that is not the message it says it is
    * BadConfiguration       a setting that cannot work
    * StateUnavailable       the state folder cannot be read or written now
    * AddressUnavailable     another program listens where we are to, or the address is not up
    * NotInstalled           a package that an extra brings is not here
    * ProbeError             hardware is present but could not be read
    * AgentNotFoundError     no such agent in the registry
    * NoSuchAgent            a name that is nobody's, or several agents'
    * RegistryUnavailable    PostgreSQL cannot be reached, or not in time
        * RegistryRefused    it answered, and would not let us in
        * TablesMissing      it lacks our tables, or has older ones
    * RowRefused             PostgreSQL would not take a value that our own checks let through
    * BusUnavailable         the broker cannot be reached, or did not confirm in time
        * BusRefused         it answered, and would not let us in
        * TopologyMissing    an exchange or queue is not there yet
        * TopologyMismatch   it is there, with other arguments
        * QueueDown          a queue is on a node of the broker that is down
        * Unroutable         the broker confirmed that no queue takes this message
        * NotTaken           a queue did not take it; another may have
        * ConsumerStuck      the broker gives our consumer nothing, whatever we do
    * CapacityError          a capacity question was not answered
        * NoResponders       nobody is listening for it
        * CapacityTimeout    nothing came back in time
        * CapacityRefused    carries the code of an ``error.v1``
            * InsufficientCapacity   nobody has that room, and why
            * ReservationNotFound    no such reservation, or long over
            * StaleFence             the reservation is over; its room may be another's
            * IdempotencyMismatch    the key was used for another request
    * NotWritten             an answer could not be printed
    * ChildFailed            a process that ``chiffon up`` started ended, or did not start
    * AlreadyUp              another ``chiffon up`` runs on this state folder

Messages say what happened, why, and what to do next, in one line, and never hold a password.
"""

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID


class ChiffonError(Exception):
    """The root: ``except ChiffonError`` catches whatever chiffon raises on purpose."""


class BadMessage(ChiffonError):
    """A body that is not the message it says it is.

    Args:
        reason: One line, safe to log: it names the field and echoes no more than a short,
            escaped piece of the value.
        code: The ``error.v1`` code that fits, where a reply is due.
    """

    def __init__(self, reason: str, code: str = "invalid_request") -> None:
        super().__init__(reason)
        self.code = code


class BadConfiguration(ChiffonError):
    """A setting that cannot work; the message names it."""


class StateUnavailable(ChiffonError):
    """The state folder cannot be read or written now: full, another user's, or damaged."""


PASSING = {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
"""Why nobody can listen now: another program does, or the host has not got that address yet."""


class AddressUnavailable(ChiffonError):
    """Nobody can listen there now, for a reason of ``PASSING``; the message names the setting."""


class NotInstalled(ChiffonError):
    """A package that an extra brings is not here; the message says how to install it."""

    @staticmethod
    def of(error: ModuleNotFoundError) -> "NotInstalled | None":
        """Return this error for a module of an extra; ``None`` for any other module."""
        package = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(package)
        if extra is None:
            return None
        return NotInstalled(f"{package} is not installed: pip install 'chiffon[{extra}]'")


EXTRAS = {
    **dict.fromkeys(("alembic", "asyncpg", "sqlalchemy", "sqlmodel"), "orchestrator"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "gateway"),
    **dict.fromkeys(("rich", "typer"), "cli"),
}
"""Which extra brings a package."""


class ProbeError(ChiffonError):
    """Hardware is present but could not be read; the message names the file or call."""


class AgentNotFoundError(ChiffonError):
    """No such agent in the registry."""

    def __init__(self, agent_id: UUID) -> None:
        super().__init__(f"agent {agent_id} is not in the registry")
        self.agent_id = agent_id


class NoSuchAgent(ChiffonError):
    """Nobody, or not one agent alone, is meant by what a person wrote."""


class RegistryUnavailable(ChiffonError):
    """PostgreSQL cannot be reached, or did not answer in time."""


class RegistryRefused(RegistryUnavailable):
    """PostgreSQL answered and would not let us in: password, database name or rights."""


class TablesMissing(RegistryUnavailable):
    """PostgreSQL lacks our tables, or has those of an older chiffon."""


class RowRefused(ChiffonError):
    """PostgreSQL would not take a value that our own checks let through."""


class BusUnavailable(ChiffonError):
    """The broker cannot be reached, or did not confirm in time."""


class BusRefused(BusUnavailable):
    """The broker answered and would not let us in: password, virtual host or permission."""


class TopologyMissing(BusUnavailable):
    """An exchange or queue is not there (yet)."""


class TopologyMismatch(BusUnavailable):
    """An exchange or queue is there with other arguments than ours."""


class QueueDown(BusUnavailable):
    """A queue is on a node of the broker that is down, and cannot be used until it is back."""

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {queue} is on a node of the broker that is down or silent")
        self.queue = queue


class Unroutable(BusUnavailable):
    """The broker took the message and said that no queue is bound for it."""


class NotTaken(BusUnavailable):
    """A queue did not take the message; others that are bound may have.

    It does so (``basic.nack``) for a queue that is full and, from RabbitMQ 4.0 on, for a classic
    queue whose node is down.
    """


class ConsumerStuck(BusUnavailable):
    """The broker gives our consumer nothing; the process ends, to be started again."""


class CapacityError(ChiffonError):
    """A capacity question was not answered."""


class NoResponders(CapacityError):
    """Nobody is listening for capacity questions. Known at once, without waiting."""


class CapacityTimeout(CapacityError):
    """Nothing came back in time; a responder may or may not have seen the question."""


class CapacityRefused(CapacityError):
    """A responder declined the question.

    Args:
        code: The machine-readable code of the ``error.v1`` reply.
        message: Its sentence for people.
        details: What programs can read beside that.
    """

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.details = dict(details or {})

    @staticmethod
    def of(code: str, message: str, details: Mapping[str, Any] | None = None) -> "CapacityRefused":
        """Return the refusal of the class that its code has."""
        return CODES[code].error(code, message, details)


class InsufficientCapacity(CapacityRefused):
    """Nobody has the room that was to be reserved.

    ``details["explanation"]`` says why; it is absent if that took too long to find out.
    """


class ReservationNotFound(CapacityRefused):
    """There is no such reservation, or it has been over for more than a day."""


class StaleFence(CapacityRefused):
    """The reservation is over, or has another fence: its room may be another's now."""


class IdempotencyMismatch(CapacityRefused):
    """The key came before, with another request."""


@dataclass(frozen=True, slots=True)
class Code:
    """What an ``error.v1`` code means: to a command, over HTTP, and to a program in Python."""

    exit_code: int
    http_status: int
    error: type[CapacityRefused] = CapacityRefused


CODES: Mapping[str, Code] = {
    "invalid_request": Code(2, 400),
    "unsupported_type": Code(1, 400),
    "agent_not_found": Code(3, 404),
    "unavailable": Code(69, 503),
    "expired": Code(75, 409),
    "internal": Code(1, 500),
    "insufficient_capacity": Code(3, 409, InsufficientCapacity),
    "idempotency_mismatch": Code(2, 409, IdempotencyMismatch),
    "stale_fence": Code(3, 409, StaleFence),
    "reservation_not_found": Code(3, 404, ReservationNotFound),
}
"""Every code of the contract: a new one is a line here."""


class NotWritten(ChiffonError):
    """An answer could not be printed: the disk is full, or nobody reads it."""


class ChildFailed(ChiffonError):
    """A child process did not start, or ended; the message ends with its last log lines."""


class AlreadyUp(ChiffonError):
    """Another ``chiffon up`` runs on this state folder."""


def exit_code(error: ChiffonError) -> int:
    """Return the exit code of a process that ends with this error (design of ``sysexits.h``).

    3 is a negative answer, 69 something that cannot be reached, 75 try again, 77 access refused,
    78 bad configuration, 1 a fault of ours.
    """
    if isinstance(error, CapacityRefused):
        return CODES[error.code].exit_code
    for kind in type(error).__mro__:
        if kind in _EXIT_CODES:
            return _EXIT_CODES[kind]
    return 1


_EXIT_CODES: dict[type, int] = {
    AgentNotFoundError: 3,
    NoSuchAgent: 3,
    NoResponders: 69,
    BusUnavailable: 69,
    RegistryUnavailable: 69,
    ChildFailed: 69,
    CapacityTimeout: 75,
    NotWritten: 75,
    AlreadyUp: 75,
    AddressUnavailable: 75,
    BusRefused: 77,
    RegistryRefused: 77,
    # To a command only: a value that somebody gave it.
    RowRefused: 2,
    TablesMissing: 78,
    BadConfiguration: 78,
    StateUnavailable: 78,
    NotInstalled: 78,
    TopologyMismatch: 78,
}

# As far as the last @ of the word: a password that should have been percent-encoded and was not
# is still a password. asyncpg also takes one from the query.
_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^\s]*@")
_PASSWORD_IN_QUERY = re.compile(r"(?<=[?&])((?:ssl)?password)=[^&\s]*")


def masked(text: str) -> str:
    """Return ``text`` with the password of every URL in it replaced by ``***``."""
    return _PASSWORD_IN_QUERY.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", text))
