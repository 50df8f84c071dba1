"""A process that needs no command line's libraries."""

import asyncio
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
