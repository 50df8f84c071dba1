"""The relay: many agents dial it instead of the broker, which has one connection for all of them.

For sites with many agents behind one uplink, and for fleets whose connections would burden the
broker. Nothing changes for an agent but the host in its ``CHIFFON_AMQP_URL``. It also starts as
``python -m chiffon.relay`` where only the agent is installed.
"""

import asyncio
import logging
import re
import resource
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import ip_address
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from chiffon import health, liveness, metrics
from chiffon.dead_letters import DeadLetters
from chiffon.errors import BadConfiguration
from chiffon.exposition import Page, exposing
from chiffon.forwarder import Forwarder
from chiffon.letters import Letters
from chiffon.link import Link
from chiffon.process import main, stopped_by
from chiffon.provisioning import await_exchange
from chiffon.settings import Settings, describe
from chiffon.topology import HEARTBEATS

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; see ``serve``."""
    # A file for each agent: the usual soft limit of 1,024 is for programs that use select(2).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    await serve(settings, stopped_by())


async def serve(
    settings: Settings, stopped: asyncio.Event, listening: asyncio.Future[int] | None = None
) -> None:
    """Serve until ``stopped``; then forward what is here, and return.

    Args:
        settings: How.
        stopped: When to stop.
        listening: Is given the port as soon as agents can dial it.

    Raises:
        BadConfiguration: The settings cannot work, or would let anybody in.
        BusRefused: The broker does not let us in.
    """
    if settings.relay_login is None and not _is_loopback(settings.relay_host):
        raise BadConfiguration(
            f"CHIFFON_RELAY_LOGIN: a relay on {settings.relay_host} can be reached by others: set "
            "user:password, and give it to its agents in their CHIFFON_AMQP_URL"
        )
    tls = await asyncio.to_thread(_tls, settings)
    name = settings.relay_name or re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
    amqp_url, login = settings.amqp_url.get_secret_value(), settings.relay_login
    async with AsyncExitStack() as stack:
        link = partial(Link, amqp_url, redial_cap_seconds=liveness.SHORTEST_LEASE_SECONDS / 3)
        outgoing = await stack.enter_async_context(
            link(
                name=f"relay {name}",
                prepare=lambda session: await_exchange(session, HEARTBEATS),
                stop_if_refused=True,
            )
        )
        setting_aside = await stack.enter_async_context(link(name=f"relay {name} sets aside"))
        letters = Letters(DeadLetters(setting_aside))
        forwarder = Forwarder(
            outgoing,
            letters,
            name=name,
            seconds=settings.relay_seconds,
            login=login.get_secret_value() if login is not None else None,
        )
        if settings.metrics_port is not None:
            await stack.enter_async_context(
                exposing(settings.metrics_host, settings.metrics_port, _pages(outgoing, forwarder))
            )
        port = await stack.enter_async_context(
            forwarder.listener.listening(settings.relay_host, settings.relay_port, tls)
        )
        log.info(
            "relay %s on %s:%d, broker %s",
            name,
            settings.relay_host,
            port,
            describe(settings.amqp_url),
        )
        if listening is not None:
            listening.set_result(port)
        await _run_until(stopped, forwarder, letters, outgoing)
    log.info("relay %s stopped", name)


async def _run_until(
    stopped: asyncio.Event, forwarder: Forwarder, letters: Letters, outgoing: Link
) -> None:
    forwarding = asyncio.create_task(forwarder.run(), name="relay")
    setting_aside = asyncio.create_task(letters.run(), name="letters")
    # Ends only where the broker refuses us; nobody else waits for it while no agent speaks.
    refused: asyncio.Future[Any] = asyncio.ensure_future(outgoing.session())
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({forwarding, refused, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if refused.done():
            await refused
            await asyncio.wait({forwarding, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if forwarding.done():
            await forwarding
        forwarder.stop()
        left = asyncio.create_task(letters.drained())
        await asyncio.wait({forwarding, left}, timeout=DRAIN_SECONDS)
        left.cancel()
    finally:
        tasks = {forwarding, setting_aside, refused, stopping}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _pages(outgoing: Link, forwarder: Forwarder) -> dict[str, Callable[[bool], Awaitable[Page]]]:
    checks = {"broker": health.connected(outgoing)}

    async def agents() -> list[Metric]:
        connected = GaugeMetricFamily(
            "chiffon_relay_connections", "Connections of agents to this relay."
        )
        connected.add_metric([], len(forwarder.listener.guests))
        return [connected]

    async def exposed(_: bool) -> Page:
        body = await metrics.page(metrics.connections({"relay": outgoing}), agents)
        return Page(body, content_type=metrics.CONTENT_TYPE)

    return {
        "/livez": health.livez,
        "/readyz": lambda verbose: health.readyz(checks, verbose),
        "/metrics": exposed,
    }


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Return how TLS is done; ``None`` for not at all."""
    if settings.relay_certificate is None:
        if settings.relay_key is not None:
            raise BadConfiguration("CHIFFON_RELAY_KEY: of no use without CHIFFON_RELAY_CERTIFICATE")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.relay_certificate, settings.relay_key)
    except OSError as error:
        raise BadConfiguration(
            f"CHIFFON_RELAY_CERTIFICATE: {settings.relay_certificate} cannot be used: {error}"
        ) from None
    return context


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main("relay", run))
