"""``python -m chiffon.agent``: the agent without the command line."""

import sys

from chiffon.agent.process import run
from chiffon.process import main

if __name__ == "__main__":
    sys.exit(main("agent", run))
