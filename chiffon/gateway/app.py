"""The gateway's web application: its routes, and what holds for all of them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from fastapi import FastAPI
from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chiffon import __version__
from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.codec import MAX_MESSAGE_BYTES
from chiffon.gateway import api, operations, pages, problems, reservations
from chiffon.gateway.forwarded import Forwarded, Network
from chiffon.gateway.history import History
from chiffon.gateway.live import Live
from chiffon.observability.health import Checks
from chiffon.observability.metrics import SECONDS, Read

REQUESTS_AT_ONCE = 64
"""API requests in work at a time: the others are told to come back."""

REQUESTS = Counter(
    "chiffon_http_requests", "HTTP requests, by route and status.", ["route", "status"]
)
ANSWERED_IN = Histogram(
    "chiffon_http_request_seconds",
    "From an HTTP request to the head of its answer.",
    ["route"],
    buckets=SECONDS,
)
FOLLOWERS = Gauge("chiffon_page_followers", "Fleet pages that are open.")


@dataclass(frozen=True)
class Parts:
    """What the application is made of.

    ``hosts``: names that requests may be for; empty for any. ``proxies``: whose headers are
    believed. ``root_path``: under which path a proxy shows us.
    """

    service: OrchestratorService
    reservations: ReservationService
    live: Live
    history: History
    checks: Checks
    reads: Sequence[Read]
    hosts: Sequence[str] = ()
    proxies: Sequence[Network] = ()
    root_path: str = ""


def make(parts: Parts) -> FastAPI:
    """Return the application."""
    app = FastAPI(
        title="chiffon",
        version=__version__,
        summary="Which of your machines can take a GPU job right now.",
        description=_DESCRIPTION,
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=_TAGS,
        # Its pages load scripts from elsewhere, and ours work without internet.
        docs_url=None,
        redoc_url=None,
        servers=[{"url": parts.root_path}] if parts.root_path else None,
        root_path_in_servers=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    problems.install(app)
    app.include_router(api.router(parts.service, parts.history))
    app.include_router(reservations.router(parts.reservations))
    app.include_router(operations.router(parts.checks, parts.reads))
    app.include_router(pages.router(parts.live))
    app.add_middleware(_Manners, hosts=frozenset(parts.hosts))
    app.add_middleware(Forwarded, trusted=parts.proxies, root_path=parts.root_path)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def openapi() -> dict[str, Any]:
    """Return the OpenAPI description, without anything that would be needed to serve."""
    nobody = cast(Any, None)
    return make(Parts(nobody, nobody, nobody, History(), checks={}, reads=[])).openapi()


def _described(app: FastAPI) -> dict[str, Any]:
    """Return the description without the answer that the framework would give to bad requests."""
    if app.openapi_schema is None:
        made = FastAPI.openapi(app)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        app.openapi_schema = made
    return app.openapi_schema


class _Manners:
    """Counts requests, refuses those that are too many at once or not for us, and sets headers."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()

        path = scope["path"].removeprefix(scope["root_path"])
        if scope["method"] == "HEAD":
            # Answered as GET is; the server, which has the scope it made, sends no body.
            scope = {**scope, "method": "GET", "is_head": True}

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                _count(scope, message["status"], began)
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                if "location" in headers:
                    # Without the host, of which a proxy may have told another.
                    headers["location"] = (
                        urlsplit(headers["location"])._replace(scheme="", netloc="").geturl()
                    )
            await send(message)

        is_api = path.startswith("/api/")
        refusal = self._refusal(scope, path, is_api)
        if refusal is not None:
            await refusal(scope, receive, send_counted)
            return
        self._in_work += is_api
        try:
            await self._app(scope, receive, send_counted)
        except Exception:
            _count(scope, 500, began)  # whoever answers it stands outside of us
            raise
        finally:
            self._in_work -= is_api

    def _refusal(self, scope: Scope, path: str, is_api: bool) -> Response | None:
        # Those who look after the gateway come by its address, whatever it is called.
        if self._hosts and path not in _OPERATIONS:
            try:
                host = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
            except ValueError:
                host = None
            if host not in self._hosts:
                return problems.answer(
                    400, "invalid_request", "not for this host name: see CHIFFON_HTTP_ALLOWED_HOSTS"
                )
        if scope["method"] == "POST":
            said = Headers(scope=scope).get("content-length", "")
            if not said.isdecimal() or int(said) > MAX_MESSAGE_BYTES:
                return problems.answer(
                    413,
                    "invalid_request",
                    f"the body must say its length, {MAX_MESSAGE_BYTES} bytes at most",
                )
        if is_api and self._in_work >= REQUESTS_AT_ONCE:
            return problems.answer(
                503, "unavailable", "too many requests at once", {"Retry-After": "1"}
            )
        return None


def _count(scope: Scope, status: int, began: float) -> None:
    # Only routes, never paths: anybody can make those up.
    route = getattr(scope.get("route"), "path", "none")
    REQUESTS.labels(route, str(status)).inc()
    ANSWERED_IN.labels(route).observe(time.monotonic() - began)


_OPERATIONS = ("/livez", "/readyz", "/metrics")
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

_DESCRIPTION = """\
The answers that planners get over AMQP, for those who speak HTTP. Sizes are GiB (2^30 bytes);
`null` is unknown and never written as 0. Errors are `application/problem+json`.
"""
_TAGS = [
    {"name": "agents", "description": "Capacity: what a planner asks."},
    {"name": "fleet", "description": "All agents, for people and their tools."},
    {"name": "reservations", "description": "Room that is held, for a time."},
    {"name": "operations", "description": "Health and metrics."},
]
