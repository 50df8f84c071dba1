"""The process of ``chiffon agent run``: this host's agent, with metrics and health.

It also starts as ``python -m chiffon.agent`` where only the agent is installed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing
from typing import Any

from chiffon.agent.base_agent import BaseAgent
from chiffon.agent.identity import Identity, open_identity
from chiffon.agent.wiring import agent_of, reader_of
from chiffon.process import patiently, stopped_by
from chiffon.settings import Settings, describe

log = logging.getLogger(__name__)


async def run(settings: Settings) -> None:
    """Be this host's agent until SIGTERM or SIGINT, then say farewell.

    Raises:
        BadConfiguration: The settings cannot work, or another agent runs on the state folder.
    """
    # First of all: who has a new incarnation owes a farewell.
    stopped = stopped_by()
    with ExitStack() as stack:

        async def identified() -> Identity:
            return stack.enter_context(open_identity(settings.state_folder))

        who = await patiently(identified, stopped, trouble="no agent without its identity")
        if who is None:
            return
        reader = stack.enter_context(closing(await reader_of(settings)))
        async with agent_of(settings, who, reader) as agent, _exposing(settings, agent):
            log.info(
                "agent %s on %s, broker %s",
                who.agent_id,
                agent.hostname,
                describe(settings.amqp_url),
            )
            sending = asyncio.ensure_future(agent.wait())
            stopping: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
            await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if sending.done():
                await sending
            sending.cancel()
    log.info("agent %s stopped", who.agent_id)


@asynccontextmanager
async def _exposing(settings: Settings, agent: BaseAgent) -> AsyncIterator[None]:
    """Serve metrics and health, where the settings name a port for them."""
    if settings.metrics_port is None:
        yield
        return
    # Only here: most agents expose nothing, and shall not load it.
    from chiffon.agent.metrics import pages
    from chiffon.observability.http import exposing

    async with exposing(settings.metrics_host, settings.metrics_port, pages(agent)) as port:
        log.info("metrics and health on %s:%d", settings.metrics_host, port)
        yield
