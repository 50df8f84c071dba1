"""The command ``chiffon``; also ``python -m chiffon``."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Run the command line; returns the exit code."""
    if find_spec("typer") is None:
        print(
            "chiffon: the command line is not installed: pip install 'chiffon[cli]'. "
            "The agent alone starts with: python -m chiffon.agent",
            file=sys.stderr,
        )
        return 78
    from chiffon.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
