"""Errors as HTTP answers: what happened, in one body for all of them (RFC 9457).

Statuses of the contract's codes are those of ``errors.CODES``. An answer never holds a stack trace,
nor what was asked.
"""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from chiffon.contract.fields import shortened
from chiffon.errors import (
    CODES,
    AgentNotFoundError,
    BadMessage,
    CapacityRefused,
    RegistryUnavailable,
)

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2


class Problem(BaseModel):
    """What went wrong. ``code`` is for programs, ``detail`` for people.

    ``details`` has more for programs, where there is more: why nobody has the room, say.
    """

    title: str
    status: int
    detail: str
    code: str
    details: dict[str, Any] | None = Field(None, exclude_if=lambda details: not details)


class ProblemError(Exception):
    """Raised by a route to answer with a problem.

    Args:
        status: Of the answer.
        code: One of the contract's codes.
        detail: One line for people.
        headers: More of them.
    """

    def __init__(
        self, status: int, code: str, detail: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers


def answer(
    status: int,
    code: str,
    detail: str,
    headers: dict[str, str] | None = None,
    details: dict[str, Any] | None = None,
) -> JSONResponse:
    """Return the answer that reports a problem."""
    problem = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail, code=code, details=details
    ).model_dump()
    return JSONResponse(problem, status, headers, media_type="application/problem+json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the problems that a route may answer with."""
    return {
        status: {
            "model": Problem,
            "description": _EXAMPLES[status]["detail"],
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {
                        "title": HTTPStatus(status).phrase,
                        "status": status,
                        **_EXAMPLES[status],
                    },
                }
            },
            **(
                {
                    "headers": {
                        "Retry-After": {
                            "description": "Seconds to wait before another try.",
                            "schema": {"type": "integer"},
                        }
                    }
                }
                if status == HTTPStatus.SERVICE_UNAVAILABLE
                else {}
            ),
        }
        for status in statuses
    }


_EXAMPLES: dict[int, dict[str, str]] = {
    400: {"detail": "Invalid agent_id format (must be UUID)", "code": "invalid_request"},
    404: {
        "detail": "agent 3f1c0a52-1c1b-4a0e-9d5c-2f7a5d1e8b90 is not in the registry",
        "code": "agent_not_found",
    },
    409: {
        "detail": "no room: 12 agents: 5 offline, 7 too little free VRAM (best 30 of 40 on rig-7)",
        "code": "insufficient_capacity",
    },
    500: {"detail": "Failed to fetch agent capacity", "code": "internal"},
    503: {"detail": "the database did not answer within 5 s", "code": "unavailable"},
}


def install(app: FastAPI) -> None:
    """Have every failure of a route answered with a problem."""
    app.add_exception_handler(ProblemError, _of_route)
    app.add_exception_handler(AgentNotFoundError, _of_unknown_agent)
    app.add_exception_handler(BadMessage, _of_bad_request)
    app.add_exception_handler(CapacityRefused, _of_refusal)
    app.add_exception_handler(RegistryUnavailable, _of_registry)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_bug)


def _of_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return answer(error.status, error.code, error.detail, error.headers)


def _of_unknown_agent(_: Request, error: Exception) -> JSONResponse:
    return answer(404, "agent_not_found", str(error))


def _of_bad_request(_: Request, error: Exception) -> JSONResponse:
    return answer(400, "invalid_request", str(error))


def _of_refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CapacityRefused)
    status = CODES[error.code].http_status
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return answer(status, error.code, error.message, headers, error.details)


def _of_registry(_: Request, error: Exception) -> JSONResponse:
    log.warning("cannot answer: %s", error)
    return answer(503, "unavailable", str(error), {"Retry-After": str(RETRY_AFTER_SECONDS)})


def _of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(word) for word in first["loc"][1:])
    if field == "reservation_id" and first["loc"][0] == "path":
        return answer(400, "invalid_request", "Invalid reservation_id format (must be UUID)")
    if field == "agent_id" and first["loc"][0] == "path":
        return answer(400, "invalid_request", "Invalid agent_id format (must be UUID)")
    problem = first["msg"].removeprefix("Value error, ")
    detail = f"{shortened(field)}: {problem}" if field else problem
    return answer(400, "invalid_request", detail)


def _methods(request: Request) -> str | None:
    """Return the methods that a path has; the framework names those of its first route only."""
    route = getattr(request.scope.get("route"), "path", None)
    described = request.app.openapi()["paths"].get(route)
    if described is None:
        return None
    names = {name.upper() for name in described}
    return ", ".join(sorted(names | {"HEAD"} if "GET" in names else names))


def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    is_method = error.status_code == HTTPStatus.METHOD_NOT_ALLOWED
    code = "unsupported_type" if is_method else "invalid_request"
    headers = dict(error.headers) if error.headers else None
    methods = _methods(request) if is_method else None
    if methods is not None:
        headers = {"Allow": methods}
    return answer(error.status_code, code, str(error.detail), headers)


_FAILED = {
    "agent_capacity": "Failed to fetch agent capacity",
    "available_capacity": "Failed to fetch available capacity",
}


def _of_bug(request: Request, _: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, and the server logs it with its traceback.
    route = getattr(request.scope.get("route"), "name", "")
    return answer(500, "internal", _FAILED.get(route, "the gateway failed; see its log"))
