"""Whether a process can do its work now: named checks, each with a time limit.

The pages are those that Kubernetes made common: ``/livez`` and ``/readyz``, with ``?verbose``.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.errors import BusUnavailable, ChiffonError, masked
from chiffon.observability.http import Page

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0

Checks = Mapping[str, Callable[[], Awaitable[None]]]
"""By name; a check that fails raises a ``ChiffonError`` that says what is wrong."""


@dataclass(frozen=True)
class Health:
    """What the checks found: by name, what is wrong, ``None`` for nothing."""

    troubles: Mapping[str, str | None]

    @property
    def is_ready(self) -> bool:
        """Whether all is well."""
        return not any(self.troubles.values())

    def text(self, *, verbose: bool) -> str:
        """Return the page: a line for each check, or just the names of those that failed."""
        failed = [name for name, trouble in self.troubles.items() if trouble]
        if not verbose:
            return f"not ready: {', '.join(failed)}\n" if failed else "ok\n"
        lines = [
            f"[-]{name} failed: {trouble}" if trouble else f"[+]{name} ok"
            for name, trouble in self.troubles.items()
        ]
        return "\n".join([*lines, "readyz check failed" if failed else "readyz check passed", ""])


async def examine(checks: Checks) -> Health:
    """Run all checks at once; one that takes longer than 2 s has failed."""
    troubles = await asyncio.gather(*(_trouble(check) for check in checks.values()))
    return Health(dict(zip(checks, troubles, strict=True)))


async def readyz(checks: Checks, verbose: bool) -> Page:
    """Return the page ``/readyz``: 200, or 503 if a check failed."""
    health = await examine(checks)
    return Page(health.text(verbose=verbose).encode(), 200 if health.is_ready else 503)


async def livez(verbose: bool = False) -> Page:
    """Return the page ``/livez``, which touches nothing: that it is made is the news."""
    return Page(b"ok\n")


def connected(supervised: ReconnectingConnection) -> Callable[[], Awaitable[None]]:
    """Return the check that a connection is open."""

    async def check() -> None:
        if supervised.current is None:
            raise BusUnavailable(supervised.trouble)

    return check


async def _trouble(check: Callable[[], Awaitable[None]]) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await check()
    except TimeoutError:
        return f"no answer within {CHECK_SECONDS:g} s"
    except ChiffonError as error:
        return masked(str(error)).replace("\n", " ")
    except Exception as error:
        log.exception("a health check failed in an unforeseen way")
        return f"unforeseen: {type(error).__name__}"
    return None
