"""An orchestrator that kills itself at its third batch or reservation, at the moment named.

    python -m tests.faults.dying_orchestrator "before the commit"

It is the real one; only the moment is arranged.
"""

import os
import signal
import sys
from typing import Any

from chiffon.amqp.consumer import Consumer
from chiffon.amqp.publisher import Publisher
from chiffon.capacity.reservations import ReservationService
from chiffon.cli import main
from chiffon.orchestrator import process as orchestrator
from chiffon.registry.heartbeats import Heartbeats

BATCHES = 3


def die_in(owner: type, method: str, *, after: int) -> None:
    """Have a method kill the process instead of doing what it does, at its ``after``-th call."""
    original, calls = getattr(owner, method), 0

    def dying(self: Any, argument: Any) -> Any:
        nonlocal calls
        calls += bool(argument)
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, argument)

    setattr(owner, method, dying)


def die_behind(owner: Any, method: str, *, after: int) -> None:
    """Have a method kill the process as soon as it has done what it does for the n-th time."""
    original, calls = getattr(owner, method), 0

    async def dying(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        answer = await original(*arguments, **more)
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, method, dying)


class Answered(Publisher):
    """Publishes the answers that need a confirm, and dies once one of them is there."""

    async def publish(self, *arguments: Any, **more: Any) -> None:
        await super().publish(*arguments, **more)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "before the commit":
        die_in(Heartbeats, "record", after=BATCHES)
    elif sys.argv[1] == "between commit and acknowledgement":
        die_in(Consumer, "acknowledge", after=BATCHES)
    elif sys.argv[1] == "before a reservation":
        die_in(ReservationService, "reserve_counting", after=BATCHES)
    elif sys.argv[1] == "between reservation and answer":
        die_behind(ReservationService, "reserve_counting", after=BATCHES)
    elif sys.argv[1] == "between answer and acknowledgement":
        orchestrator.Publisher = Answered  # type: ignore[attr-defined]
    elif sys.argv[1] == "before a release":
        die_in(ReservationService, "release", after=BATCHES)
    elif sys.argv[1] == "between release and answer":
        die_behind(ReservationService, "release", after=BATCHES)
    else:
        sys.exit(f"no such moment: {sys.argv[1]}")
    sys.argv[1:] = ["orchestrator", "run"]
    sys.exit(main())
