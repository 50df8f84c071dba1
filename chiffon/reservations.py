"""Taking room: who may have it, what the answer is when there is none, and when it is over.

``ReservationService`` keeps reservations in the registry; ``planner.PlannerClient`` asks one over
AMQP.
"""

import asyncio
import logging
import random
import time
from datetime import UTC
from uuid import UUID

from chiffon.capacity import OrchestratorService
from chiffon.errors import (
    CapacityRefused,
    IdempotencyMismatch,
    InsufficientCapacity,
    RegistryUnavailable,
    ReservationNotFound,
    StaleFence,
)
from chiffon.messages import (
    CapacityReserve,
    Explanation,
    Reservation,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    Reservations,
)
from chiffon.registry import Registry
from chiffon.registry.ledger import Claim, Ledger, Refused

log = logging.getLogger(__name__)

CONTENDED_SECONDS = 2.0
"""For taking room that others are at: each of them holds a row for a commit, a few milliseconds."""

EXPLAINED_SECONDS = 2.0
"""For finding out why there is no room. That there is none is known by then, and has to be said."""

UNEXPLAINED_SECONDS = 10.0
"""Without a try, after one that took too long: the fleet is as large as before."""

FIRST_PAUSE_SECONDS = 0.002
LONGEST_PAUSE_SECONDS = 0.1


class ReservationService:
    """Reservations in the registry.

    Args:
        registry: Where the fleet is; all methods raise ``RegistryUnavailable`` when it is away.
    """

    def __init__(self, registry: Registry) -> None:
        self._ledger = Ledger(registry)
        self._capacity = OrchestratorService(registry)
        self._explaining: dict[str, asyncio.Task[Explanation | None]] = {}
        self._unexplained_until = 0.0

    async def reserve(self, request: CapacityReserve) -> Reservation:
        """Take room, one transaction for each of the choices until one is free.

        Returns:
            The reservation. Of a key that was used before it is the one of then, as it is now,
            which may be over.

        Raises:
            InsufficientCapacity: None of the choices is free; the details say why the first is not,
                unless that takes more than 2 s to find out.
            IdempotencyMismatch: The key came before, with another request.
            CapacityRefused: ``unavailable``: others were at the same room all the time.
        """
        return (await self.claim(request)).reservation

    async def claim(self, request: CapacityReserve) -> Claim:
        """Take room as ``reserve`` does, for who may have to give it back undelivered."""
        is_contended = False
        deadline = time.monotonic() + CONTENDED_SECONDS
        for number, choice in enumerate(request.choices()):
            made = await self._claim(choice, number, request, deadline)
            if isinstance(made, Refused):
                is_contended = is_contended or made.is_contended
                continue
            if not made.is_same:
                raise IdempotencyMismatch(
                    "idempotency_mismatch",
                    f"idempotency_key {request.idempotency_key} came before with another request;"
                    " a new intent needs a new key",
                )
            return made
        if is_contended:
            raise CapacityRefused("unavailable", "others are taking the same room; try again")
        explanation = await self._explain(request)
        raise InsufficientCapacity(
            "insufficient_capacity",
            _sentence(request, explanation),
            {} if explanation is None else {"explanation": explanation.model_dump(mode="json")},
        )

    async def _claim(
        self, choice: CapacityReserve, number: int, request: CapacityReserve, deadline: float
    ) -> Claim | Refused:
        pause = FIRST_PAUSE_SECONDS
        while True:
            made = await self._ledger.claim(choice, alternative=number, asked_for=request)
            is_final = isinstance(made, Claim) or not made.is_contended
            if is_final or time.monotonic() > deadline:
                return made
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)

    async def _explain(self, request: CapacityReserve) -> Explanation | None:
        """Say why there is no room; all who ask for the same at once share one look at the fleet.

        It looks at every agent, which a herd of losers would otherwise do once each.
        """
        wanted = request.model_dump_json(exclude={"holder", "idempotency_key", "lease_seconds"})
        looking = self._explaining.get(wanted)
        if looking is None:
            looking = asyncio.create_task(self._look(request))
            self._explaining[wanted] = looking
            looking.add_done_callback(lambda _: self._explaining.pop(wanted, None))
        return await asyncio.shield(looking)

    async def _look(self, request: CapacityReserve) -> Explanation | None:
        if time.monotonic() < self._unexplained_until:
            return None
        try:
            async with asyncio.timeout(EXPLAINED_SECONDS):
                return await self._capacity.explain_refusal(request)
        except (TimeoutError, RegistryUnavailable) as error:
            self._unexplained_until = time.monotonic() + UNEXPLAINED_SECONDS
            why = str(error) or f"{EXPLAINED_SECONDS:g} s were not enough to look at every agent"
            log.warning("refusals are without a reason for %g s: %s", UNEXPLAINED_SECONDS, why)
            return None

    async def undelivered(self, claim: Claim) -> bool:
        """Give room back whose reservation nobody took note of; returns whether it was."""
        return await self._ledger.release_undelivered(claim)

    async def renew(self, request: ReservationRenew) -> Reservation:
        """Let a lease begin anew, also late, as long as it has not been ended.

        Raises:
            ReservationNotFound: There is no such reservation.
            StaleFence: It is over, or has another fence.
        """
        renewed = await self._ledger.renew(
            request.reservation_id, request.fence, request.lease_seconds
        )
        if renewed is None:
            raise await self._stale(request.reservation_id, request.fence)
        return renewed

    async def release(self, request: ReservationRelease) -> Reservation:
        """Give room back. What was given back is answered again as it was.

        Raises:
            ReservationNotFound: There is no such reservation.
            StaleFence: It ended otherwise, or has another fence.
        """
        released = await self._ledger.release(request.reservation_id, request.fence)
        if released is not None:
            return released
        known = await self._ledger.show(request.reservation_id)
        is_same = known is not None and request.fence in (None, known.fence)
        if known is not None and is_same and known.state == "released":
            return known
        raise await self._stale(request.reservation_id, request.fence)

    async def reservation(self, reservation_id: UUID) -> Reservation:
        """Return one that is held, or ended within the last day.

        Raises:
            ReservationNotFound: There is no such reservation.
        """
        known = await self._ledger.show(reservation_id)
        if known is None:
            raise _not_found(reservation_id)
        return known

    async def reservations(self, wanted: ReservationList) -> Reservations:
        """Return those that fit, newest first."""
        return await self._ledger.listed(wanted)

    async def _stale(self, reservation_id: UUID, fence: int | None) -> CapacityRefused:
        known = await self._ledger.show(reservation_id)
        if known is None:
            return _not_found(reservation_id)
        details = {"state": known.state, "reason": known.reason, "fence": known.fence}
        if fence is not None and fence != known.fence:
            message = f"reservation {reservation_id} has fence {known.fence}, not {fence}"
        elif known.ended_at is None:
            message = f"an agent of reservation {reservation_id} was forgotten: its room is gone"
        else:
            when = known.ended_at.astimezone(UTC).isoformat(timespec="seconds")
            message = (
                f"reservation {reservation_id} is over since {when}: {known.reason};"
                " its room may be another's"
            )
        return StaleFence("stale_fence", message, details)


def _not_found(reservation_id: UUID) -> ReservationNotFound:
    return ReservationNotFound(
        "reservation_not_found",
        f"there is no reservation {reservation_id}, or it has been over for more than a day",
    )


def _sentence(request: CapacityReserve, explanation: Explanation | None) -> str:
    others = len(request.alternatives)
    why = "the reason could not be found out" if explanation is None else explanation.summary
    sentence = f"no room: {why}"
    if others:
        sentence += f"; nor for the {'alternative' if others == 1 else f'{others} alternatives'}"
    if explanation is not None and explanation.relaxation is not None:
        sentence += f"; {explanation.relaxation.message}"
    return sentence
