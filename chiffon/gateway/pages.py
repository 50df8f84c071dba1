"""The fleet page, its files, and the stream that keeps it fresh. None of it needs a build."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.types import Message, Send

from chiffon.gateway.live import Live
from chiffon.gateway.problems import ProblemError

STATIC = Path(__file__).parent / "static"

MOST_FOLLOWERS = 100
SEND_SECONDS = 20.0

log = logging.getLogger(__name__)

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS: Mapping[str, str] = {
    # Only our own files, whatever an agent calls itself.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}


def router(live: Live) -> APIRouter:
    """Return the routes of the page."""
    pages = APIRouter(include_in_schema=False)
    files = dict(_files())

    @pages.get("/")
    async def page() -> FileResponse:
        return _file(files["index.html"])

    @pages.get("/static/{name}")
    async def static(name: str) -> FileResponse:
        if name not in files:
            raise ProblemError(404, "invalid_request", "there is no such file")
        return _file(files[name])

    @pages.get("/stream")
    async def stream(request: Request) -> Response:
        if request.scope.get("is_head"):  # what would never end is not begun
            return Response(media_type="text/event-stream")
        if live.followers >= MOST_FOLLOWERS:
            raise ProblemError(
                503, "unavailable", "too many pages are open", headers={"Retry-After": "10"}
            )
        return _Stream(
            live.follow(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    return pages


class _Stream(StreamingResponse):
    """Server-sent events; whoever does not read them for 20 s is let go."""

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            log.info("a page that does not read is let go")


def _files() -> Iterator[tuple[str, Path]]:
    for path in STATIC.iterdir():
        if path.suffix in _TYPES:
            yield path.name, path


def _file(path: Path) -> FileResponse:
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=dict(HEADERS))
