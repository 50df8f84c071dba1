"""Health and metrics over HTTP for processes without a web framework: agent and orchestrator.

The pages are made on the process's own event loop, so that an answer also shows that the loop
still turns; the sockets are served by threads, so that a loop that does not is reported as that.
"""

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import parse_qs, urlsplit

from chiffon.errors import PASSING, AddressUnavailable, BadConfiguration

ANSWER_SECONDS = 5.0
SOCKET_SECONDS = 10.0
REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class Page:
    """An answer; ``content_type`` is that of ``body``."""

    body: bytes
    status: int = 200
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[bool], Awaitable[Page]]]
"""By path; each is told whether ``?verbose`` was asked for."""


@asynccontextmanager
async def exposing(host: str, port: int, pages: Pages) -> AsyncIterator[int]:
    """Serve pages while the context is open.

    Args:
        host: The address to listen on.
        port: 0 for any that is free.
        pages: What to serve.

    Yields:
        The port.

    Raises:
        BadConfiguration: Nobody can listen there.
        AddressUnavailable: Nobody can now: another program does, or the address is not up yet.
    """
    loop = asyncio.get_running_loop()
    try:
        server = _Server((host, port), _Handler)
    except OSError as error:
        kind = AddressUnavailable if error.errno in PASSING else BadConfiguration
        raise kind(
            f"CHIFFON_METRICS_PORT: cannot listen on {host}:{port}: {error.strerror}"
        ) from None
    server.loop, server.pages = loop, pages
    thread = threading.Thread(target=server.serve_forever, name="exposition", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    loop: asyncio.AbstractEventLoop
    pages: Pages

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.free = threading.BoundedSemaphore(REQUESTS_AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Without that of HTTPServer, which looks the host's name up: that may take seconds.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    timeout = SOCKET_SECONDS
    server: _Server

    def do_GET(self) -> None:
        if not self.server.free.acquire(blocking=False):
            self._send(Page(b"too many requests at once\n", 503))
            return
        try:
            self._send(self._page())
        finally:
            self.server.free.release()

    do_HEAD = do_GET

    def _page(self) -> Page:
        parts = urlsplit(self.path)
        make = self.server.pages.get(parts.path)
        if make is None:
            return Page(f"there is {', '.join(self.server.pages)}\n".encode(), 404)
        verbose = "verbose" in parse_qs(parts.query, keep_blank_values=True)
        making = asyncio.run_coroutine_threadsafe(_made(make, verbose), self.server.loop)
        try:
            return making.result(ANSWER_SECONDS)
        except concurrent.futures.TimeoutError:
            making.cancel()
            return Page(f"no answer within {ANSWER_SECONDS:g} s\n".encode(), 503)

    def _send(self, page: Page) -> None:
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def version_string(self) -> str:
        return "chiffon"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: a scrape every few seconds is no news."""


async def _made(make: Callable[[bool], Awaitable[Page]], verbose: bool) -> Page:
    return await make(verbose)
