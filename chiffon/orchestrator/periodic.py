"""Work that is done again and again, whatever trouble there is."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from chiffon.errors import BusUnavailable, RegistryUnavailable
from chiffon.logs import Trouble

log = logging.getLogger(__name__)


async def every(
    seconds: float,
    work: Callable[[], Awaitable[object]],
    *,
    trouble: str,
    wake: asyncio.Event | None = None,
) -> None:
    """Do ``work`` at once and then every so often, until cancelled.

    A broker or database that is away is waited for, and said once a minute. What a bug, or
    a row that somebody else wrote, makes the work raise is logged with its traceback: it must not
    end the process, again and again.

    Args:
        seconds: From the end of one turn to the next.
        work: One turn.
        trouble: What is not done meanwhile, for people: ``no sweep``.
        wake: Begins the next turn when it is set, and is cleared by that.
    """
    lasting = Trouble()
    while True:
        try:
            await work()
            lasting.is_over()
        except (BusUnavailable, RegistryUnavailable) as error:
            if lasting.is_news(str(error)):
                log.warning("%s: %s", trouble, error)
        except Exception:
            log.exception("%s: it failed in an unforeseen way", trouble)
        await _pause(seconds, wake)


async def _pause(seconds: float, wake: asyncio.Event | None) -> None:
    if wake is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
    wake.clear()
