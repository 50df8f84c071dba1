"""How a process of chiffon is started and stopped; no command line's libraries are needed."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from chiffon.errors import (
    BusUnavailable,
    ChiffonError,
    NotInstalled,
    RegistryUnavailable,
    StateUnavailable,
    exit_code,
)
from chiffon.logs import Trouble, configure
from chiffon.settings import Settings, load

log = logging.getLogger(__name__)

T = TypeVar("T")
Run = Callable[[Settings], Awaitable[None]]

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0


def main(name: str, load_run: Callable[[], Run]) -> int:
    """Run one of chiffon's processes with the settings of the environment.

    Args:
        name: What it is, for people.
        load_run: Loads what serves until it is stopped.

    Returns:
        The exit code; what went wrong stands on standard error, in one line.
    """
    argparse.ArgumentParser(
        prog=f"python -m chiffon.{name}",
        description=f"Run chiffon's {name} until SIGTERM or Ctrl-C. It takes no arguments: all is "
        "set by CHIFFON_* variables, which docs/settings.md lists; at least CHIFFON_AMQP_URL.",
    ).parse_args()

    async def serve(settings: Settings) -> None:
        await load_run()(settings)

    try:
        settings = load()
        configure(settings.log_format, settings.log_level)
        asyncio.run(serve(settings))
    except ChiffonError as error:
        print(f"chiffon {name}: {error}", file=sys.stderr)
        return exit_code(error)
    except ModuleNotFoundError as error:
        missing = NotInstalled.of(error)
        if missing is None:
            raise
        print(f"chiffon {name}: {missing}", file=sys.stderr)
        return exit_code(missing)
    return 0


def stopped_by(*signals: signal.Signals) -> asyncio.Event:
    """Return an event that these signals set, SIGTERM and SIGINT unless told."""
    stopped = asyncio.Event()
    for number in signals or (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def patiently(
    work: Callable[[], Awaitable[T]],
    stopped: asyncio.Event,
    *,
    trouble: str,
    lasting: Trouble | None = None,
) -> T | None:
    """Do what a process needs first, as soon as it can be done.

    What a person has to mend is waited for, and said once a minute: a user that is made later, a
    database without tables, a full disk. A supervisor that gave up would need a second command.

    Args:
        work: Tried every few seconds.
        stopped: Ends the waiting.
        trouble: What is not done meanwhile, for people.
        lasting: Where it is kept what is waited for, for whoever asks meanwhile.

    Returns:
        What ``work`` returned; ``None`` if stopped before.
    """
    lasting = lasting or Trouble()
    pause = FIRST_PAUSE_SECONDS
    while not stopped.is_set():
        try:
            return await work()
        except (BusUnavailable, RegistryUnavailable, StateUnavailable) as error:
            if lasting.is_news(str(error)):
                log.warning("%s, waiting: %s", trouble, error)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stopped.wait()
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    return None


def spare_collector() -> None:
    """Let the collector of cycles look less often, in a process that handles many rows at once.

    Ten times in a batch of heartbeats it would look through all that the batch holds, in vain: a
    third of the work on a heartbeat. A gateway that knows 100,000 agents would stand still for
    half a second at each look at them.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
