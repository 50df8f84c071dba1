"""An orchestrator that kills itself at its third batch with heartbeats, at the moment named.

    python -m tests.faults.dying_orchestrator "before the commit"

It is the real one; only the moment is arranged.
"""

import os
import signal
import sys
from typing import Any

from chiffon.cli import main
from chiffon.ingest import Ingest
from chiffon.registry import Registry

BATCHES = 3


def die_in(owner: type, method: str, *, after: int) -> None:
    """Have a method kill the process instead of doing what it does, at its ``after``-th call."""
    original, calls = getattr(owner, method), 0

    async def dying(self: Any, argument: Any) -> Any:
        nonlocal calls
        calls += bool(argument)
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return await original(self, argument)

    setattr(owner, method, dying)


if __name__ == "__main__":
    if sys.argv[1] == "before the commit":
        die_in(Registry, "record", after=BATCHES)
    elif sys.argv[1] == "between commit and acknowledgement":
        die_in(Ingest, "_acknowledge", after=BATCHES)
    else:
        sys.exit(f"no such moment: {sys.argv[1]}")
    sys.argv[1:] = ["orchestrator", "run"]
    sys.exit(main())
