"""``/livez``, ``/readyz`` and ``/metrics`` of the gateway."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from chiffon.observability import health, metrics
from chiffon.observability.health import Checks
from chiffon.observability.http import Page
from chiffon.observability.metrics import Read


def router(checks: Checks, reads: Sequence[Read]) -> APIRouter:
    """Return the routes for whoever runs the gateway."""
    operations = APIRouter(tags=["operations"])

    @operations.get("/livez", summary="Does the process answer?", response_class=_Text)
    async def livez() -> Response:
        """Touches nothing; that it answers is the news."""
        return _response(await health.livez())

    @operations.get(
        "/readyz",
        summary="Can it do its work now?",
        response_class=_Text,
        responses={503: {"description": "No; the body names what fails."}},
    )
    async def readyz(request: Request, verbose: str | None = None) -> Response:
        """Broker, database and migrations, each with 2 s; `?verbose` has a line for each."""
        return _response(await health.readyz(checks, "verbose" in request.query_params))

    @operations.get("/metrics", summary="For Prometheus", response_class=_Text)
    async def exposed() -> Response:
        """What the gateway did, and what the registry holds, in Prometheus's text format."""
        return Response(await metrics.page(*reads), media_type=metrics.CONTENT_TYPE)

    return operations


class _Text(Response):
    media_type = "text/plain"


def _response(page: Page) -> Response:
    return Response(page.body, page.status, media_type=page.content_type)
