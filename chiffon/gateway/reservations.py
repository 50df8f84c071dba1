"""``/api/v1/reservations``: taking room over HTTP, with the bodies that AMQP has."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import ConfigDict, Field

from chiffon.capacity.reservations import ReservationService
from chiffon.contract.fields import Name, OnlyKnownFields
from chiffon.contract.messages import (
    MAX_OFFERS,
    CapacityReserve,
    Reservation,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    Reservations,
    ReservationState,
)
from chiffon.contract.reservation import Fence, LeaseSeconds
from chiffon.gateway import examples
from chiffon.gateway.parameters import no_parameters, once
from chiffon.gateway.problems import documented

ReservationId = Annotated[
    UUID,
    Path(description="The reservation's id.", examples=["0f6b3a80-8a52-4a59-9f9d-0d1c3f6f8f11"]),
]


class ListParameters(OnlyKnownFields):
    """Which reservations are listed."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    state: ReservationState | None = Field(None, description="Only these; default: all.")
    holder: Name | None = Field(None, description="Only this holder's.")
    agent_id: UUID | None = Field(None, description="Only those on this agent.")
    limit: int = Field(100, ge=1, le=MAX_OFFERS)


class Renewal(OnlyKnownFields):
    """A lease that begins anew; both fields may be left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    fence: Fence | None = Field(None, description="Must be its own, if given.")
    lease_seconds: LeaseSeconds | None = Field(None, description="Default: as before.")


class Release(OnlyKnownFields):
    """Room that is given back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    fence: Fence | None = Field(None, description="Must be its own, if given.")


def router(service: ReservationService) -> APIRouter:
    """Return the routes of reservations."""
    api = APIRouter(prefix="/api/v1/reservations", tags=["reservations"])

    @api.post(
        "",
        summary="Take room",
        dependencies=[Depends(no_parameters)],
        status_code=201,
        responses={
            200: {"description": "The reservation that this key made before."},
            201: {"description": "A new reservation."},
            **documented(400, 409, 500, 503),
        },
    )
    async def reserve(request: CapacityReserve, response: Response) -> Reservation:
        """Find the best agent and take room on it, or on `count` of them, in one transaction.

        409 `insufficient_capacity` says in `details` who is full and why, and what would fit,
        unless that takes more than 2 s to find out.
        """
        made = await service.reserve_counting(request)
        if made.requests > 1:
            response.status_code = 200
        return made.reservation

    @api.get(
        "",
        summary="Reservations, newest first",
        dependencies=[Depends(once)],
        responses={
            200: examples.shown({"as_of": "2026-01-01T00:00:00Z", "reservations": []}),
            **documented(400, 500, 503),
        },
    )
    async def reservations(parameters: Annotated[ListParameters, Query()]) -> Reservations:
        """Those that are over are known for a day."""
        return await service.reservations(ReservationList(**parameters.model_dump()))

    @api.get(
        "/{reservation_id}",
        summary="One reservation",
        dependencies=[Depends(no_parameters)],
        responses={200: examples.shown(examples.RESERVATION), **documented(400, 404, 500, 503)},
    )
    async def reservation(reservation_id: ReservationId) -> Reservation:
        """Also one that is over, for a day."""
        return await service.reservation(reservation_id)

    @api.post(
        "/{reservation_id}/renew",
        summary="Let a lease begin anew",
        dependencies=[Depends(no_parameters)],
        responses={
            200: examples.shown(examples.RESERVATION),
            **documented(400, 404, 409, 500, 503),
        },
    )
    async def renew(reservation_id: ReservationId, renewal: Renewal) -> Reservation:
        """409 `stale_fence`: it is over, and its room may be another's."""
        return await service.renew(
            ReservationRenew(reservation_id=reservation_id, **renewal.model_dump())
        )

    @api.post(
        "/{reservation_id}/release",
        summary="Give room back",
        dependencies=[Depends(no_parameters)],
        responses={
            200: examples.shown(examples.RESERVATION),
            **documented(400, 404, 409, 500, 503),
        },
    )
    async def release(reservation_id: ReservationId, released: Release) -> Reservation:
        """Giving it back twice is answered twice the same."""
        return await service.release(
            ReservationRelease(reservation_id=reservation_id, fence=released.fence)
        )

    return api
