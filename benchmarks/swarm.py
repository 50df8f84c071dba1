"""Many agents in one process, each with its own connection, for `benchmarks.connections`."""

import asyncio
import contextlib
import logging
import os
import sys

from chiffon import BaseAgent
from tests.fixtures.resources import FixedResources


async def main() -> None:
    """Be so many agents until killed."""
    url, count = os.environ["SWARM_URL"], int(sys.argv[1])
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    logging.getLogger("chiffon").setLevel(logging.CRITICAL)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            agent = BaseAgent(url, pool_name="swarm", resources=FixedResources())
            await stack.enter_async_context(agent)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
