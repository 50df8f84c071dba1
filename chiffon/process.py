"""How a process of chiffon is started and stopped; no command line's libraries are needed."""

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable

from chiffon.errors import ChiffonError, exit_code
from chiffon.logs import configure
from chiffon.settings import Settings, load


def main(name: str, run: Callable[[Settings], Awaitable[None]]) -> int:
    """Run one of chiffon's processes with the settings of the environment.

    Args:
        name: What it is, for people.
        run: Serves until it is stopped.

    Returns:
        The exit code; what went wrong stands on standard error, in one line.
    """

    async def serve(settings: Settings) -> None:
        await run(settings)

    try:
        settings = load()
        configure(settings.log_format, settings.log_level)
        asyncio.run(serve(settings))
    except ChiffonError as error:
        print(f"chiffon {name}: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


def stopped_by(*signals: signal.Signals) -> asyncio.Event:
    """Return an event that these signals set, SIGTERM and SIGINT unless told."""
    stopped = asyncio.Event()
    for number in signals or (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def spare_collector() -> None:
    """Let the collector of cycles look less often, in a process that handles many rows at once.

    Ten times in a batch of heartbeats it would look through all that the batch holds, in vain: a
    third of the work on a heartbeat. A gateway that knows 100,000 agents would stand still for
    half a second at each look at them.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
