"""The gateway: the capacity answers over HTTP, the fleet page, health and metrics.

Any number may run. It answers from the registry, and writes reservations there.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvicorn

from chiffon.amqp.connection import Connection
from chiffon.amqp.declare import await_exchange
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.topology import RPC
from chiffon.errors import PASSING, AddressUnavailable, BadConfiguration
from chiffon.gateway.app import FOLLOWERS, Parts, make
from chiffon.gateway.forwarded import networks
from chiffon.gateway.history import History
from chiffon.gateway.live import Live
from chiffon.observability import fleet_metrics, health, metrics
from chiffon.process import spare_collector, stopped_by
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from chiffon.settings import Settings, describe

log = logging.getLogger(__name__)

CONNECTIONS = 1_000
"""At most; beyond that a request is answered with 503 at once."""

STOP_SECONDS = 5


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; see ``serve``."""
    spare_collector()
    await serve(settings, stopped_by())


async def serve(settings: Settings, stopped: asyncio.Event) -> None:
    """Serve until ``stopped``; then finish the requests at hand and return.

    It starts without broker and database, and says on ``/readyz`` that they are away.

    Raises:
        BadConfiguration: Nobody can listen at that address.
        AddressUnavailable: Nobody can now: another program does, or the address is not up yet.
    """
    if settings.http_fd is not None:
        listening = _inherited(settings.http_fd)
    else:
        listening = _listen(settings.http_host, settings.http_port)
    async with AsyncExitStack() as stack:
        stack.enter_context(contextlib.closing(listening))
        registry = await stack.enter_async_context(
            Registry.open(settings.database_url.get_secret_value())
        )
        supervised = await stack.enter_async_context(
            ReconnectingConnection(
                settings.amqp_url.get_secret_value(), name="gateway", prepare=_await_topology
            )
        )
        history = History()
        live = Live(registry, history)
        FOLLOWERS.set_function(lambda: live.followers)
        parts = Parts(
            service=OrchestratorService(registry),
            reservations=ReservationService(registry),
            live=live,
            history=history,
            checks={"broker": health.connected(supervised), **migrations.checks(registry)},
            reads=[
                metrics.connections({"health": supervised}),
                fleet_metrics.fleet(registry, settings.metrics_agent_limit),
            ],
            hosts=_hosts(settings.http_host, settings.http_allowed_hosts),
            proxies=networks(settings.http_trusted_proxies),
            root_path=settings.http_root_path,
        )
        server = _Server(
            uvicorn.Config(
                make(parts),
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
                timeout_keep_alive=settings.http_keep_alive_seconds,
            )
        )
        log.info(
            "gateway on %s, broker %s, database %s",
            _url(listening),
            describe(settings.amqp_url),
            describe(settings.database_url),
        )
        await _serve(server, listening, live, stopped)
    log.info("gateway stopped")


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leave the signals to the process, which stops us in order."""
        yield


async def _serve(
    server: uvicorn.Server, listening: socket.socket, live: Live, stopped: asyncio.Event
) -> None:
    serving = asyncio.create_task(server.serve([listening]), name="http")
    looking = asyncio.create_task(live.run(), name="live")
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({serving, looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
    live.close()  # streams never end by themselves
    server.should_exit = True
    looking.cancel()
    stopping.cancel()
    await asyncio.wait({serving, looking, stopping})
    for task in (serving, looking):
        if not task.cancelled():
            task.result()


def _inherited(descriptor: int) -> socket.socket:
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise BadConfiguration(
            f"CHIFFON_HTTP_FD: no socket is {descriptor}: {error.strerror}"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # The event loop turns Nagle's algorithm off only for sockets that say they are TCP: else
        # each answer waits 40 ms for an acknowledgement of its head.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise BadConfiguration(f"CHIFFON_HTTP_HOST: {host}: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1_024)
    except OSError as error:
        listening.close()
        kind = AddressUnavailable if error.errno in PASSING else BadConfiguration
        raise kind(f"CHIFFON_HTTP_PORT: cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _hosts(host: str, allowed: Sequence[str]) -> list[str]:
    """Return the host names that requests may be for; empty for any.

    On a loopback address only its own names: a page from elsewhere whose name was made to point
    there must not read the fleet.
    """
    if allowed:
        return [name.lower() for name in allowed]
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return ["localhost", "127.0.0.1", "::1", host] if is_loopback else []


async def _await_topology(connection: Connection) -> None:
    await await_exchange(connection, RPC)
