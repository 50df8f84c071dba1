"""``python -m chiffon.agent``: the agent without the command line."""

import sys

from chiffon.process import Run, main


def load() -> Run:
    """Return what runs it; only here, so that what is not installed can be told of."""
    from chiffon.agent.process import run

    return run


if __name__ == "__main__":
    sys.exit(main("agent", load))
