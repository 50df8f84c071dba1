"""Reservations: who may have room, what the answer is when there is none, and when it is over.

``ReservationService`` keeps reservations in the registry; ``planner.PlannerClient`` asks one over
AMQP.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from uuid import UUID

from chiffon.capacity.room import Wanted, allocate, fits, room
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import (
    MAX_OFFERS,
    CapacityReserve,
    Explanation,
    Reservation,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    Reservations,
)
from chiffon.errors import (
    CapacityRefused,
    IdempotencyMismatch,
    InsufficientCapacity,
    RegistryUnavailable,
    ReservationNotFound,
    StaleFence,
)
from chiffon.registry.registry import Registry
from chiffon.registry.reservations import Ended, Made, Reserving, Taken
from chiffon.registry.rows import Available, Candidate, Reserved, document, mapping_of

log = logging.getLogger(__name__)

CONTENDED_SECONDS = 2.0
"""For taking room that others are at: each of them holds a row for a commit, a few milliseconds."""

EXPLAINED_SECONDS = 2.0
"""For finding out why there is no room. That there is none is known by then, and has to be said."""

UNEXPLAINED_SECONDS = 10.0
"""Without a try, after one that took too long: the fleet is as large as before."""

FIRST_PAUSE_SECONDS = 0.002
LONGEST_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was reserved. ``is_contended``: something fits, and others are at it just now."""

    is_contended: bool


class ReservationService:
    """Reservations in the registry.

    Args:
        registry: Where the fleet is; all methods raise ``RegistryUnavailable`` when it is away.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._rows = registry.reservations
        self._capacity = OrchestratorService(registry)
        self._explaining: dict[str, asyncio.Task[Explanation | None]] = {}
        self._unexplained_until = 0.0

    async def reserve(self, request: CapacityReserve) -> Reservation:
        """Return the reservation that ``reserve_counting`` makes, and raise what it does."""
        return (await self.reserve_counting(request)).reservation

    async def reserve_counting(self, request: CapacityReserve) -> Made:
        """Reserve room, one transaction for each of the choices until one is free.

        Returns:
            The reservation, and how often it was requested. Of a key that was used before it is the
            one of then, as it is now, which may be over.

        Raises:
            InsufficientCapacity: None of the choices is free; the details say why the first is not,
                unless that takes more than 2 s to find out.
            IdempotencyMismatch: The key came before, with another request.
            CapacityRefused: ``unavailable``: others were at the same room all the time.
        """
        is_contended = False
        deadline = time.monotonic() + CONTENDED_SECONDS
        for number, choice in enumerate(request.choices()):
            made = await self._until_decided(choice, number, request, deadline)
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
            raise CapacityRefused("unavailable", "others are reserving the same room; try again")
        explanation = await self._explain(request)
        raise InsufficientCapacity(
            "insufficient_capacity",
            _sentence(request, explanation),
            {} if explanation is None else {"explanation": explanation.model_dump(mode="json")},
        )

    async def _until_decided(
        self, choice: CapacityReserve, number: int, request: CapacityReserve, deadline: float
    ) -> Made | Refused:
        pause = FIRST_PAUSE_SECONDS
        while True:
            made = await self._reserve(choice, number, request)
            is_final = isinstance(made, Made) or not made.is_contended
            if is_final or time.monotonic() > deadline:
                return made
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)

    async def _reserve(
        self, choice: CapacityReserve, number: int, request: CapacityReserve
    ) -> Made | Refused:
        """Reserve one choice, all or nothing, in one transaction."""
        wanted, digest = Wanted.of(choice), _digest(request)
        with suppress(_RolledBackError):
            async with self._rows.reserving(choice) as reserving:
                candidates = await _lock(reserving, choice, wanted)
                if len(candidates) == choice.count:
                    taken = [_taken(one, wanted) for one in candidates]
                    taken.sort(key=lambda one: one.agent_id)
                    made = await reserving.write(choice, digest, taken, alternative=number)
                    if made is not None:
                        return made
                raise _RolledBackError
        known = await self._rows.request_again(request, digest)
        return known or Refused(is_contended=await self._would_fit(choice, wanted))

    async def _would_fit(self, choice: CapacityReserve, wanted: Wanted) -> bool:
        """Return whether as many fit as are wanted, so that others must have been at them."""
        if not choice.distinct_hosts:
            found = await self._capacity.candidates(wanted, choice.count)
            return len(found.candidates) == choice.count
        found = await self._capacity.candidates(wanted, MAX_OFFERS)
        return len({_host(one) for one in found.candidates}) >= choice.count

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

    async def undelivered(self, made: Made) -> bool:
        """Give room back whose reservation nobody took note of; returns whether it was.

        A second answer that finds nobody tells nothing: the first may have arrived. The key is
        free again: who requests once more gets a new reservation.
        """
        if made.requests > 1:
            return False
        return bool(
            await self._end(self._rows.release_undelivered(made.reservation.reservation_id))
        )

    async def expire(self) -> list[Reservation]:
        """End those that were not renewed in time, at most 500; returns them."""
        return await self._end(self._rows.expire())

    async def revoke(self, offline_seconds: float) -> list[Reservation]:
        """End those on agents that nothing can be held on, at most 500; returns them.

        Args:
            offline_seconds: For how long what is held on an agent outlives its going offline.
        """
        return await self._end(self._rows.revoke(offline_seconds))

    async def purge(self) -> None:
        """Forget those that ended more than a day ago."""
        await self._rows.purge()

    async def forget_agents(
        self, agent_ids: Sequence[UUID]
    ) -> tuple[Sequence[UUID], list[Reservation]]:
        """Remove agents, after ending what is reserved on them.

        Returns:
            The agents that were there, and the reservations that were ended.
        """
        ended = await self._end(self._rows.revoke_on(agent_ids))
        return await self._registry.agents.forget(agent_ids), ended

    async def _end(self, ending: Awaitable[Ended]) -> list[Reservation]:
        ended = await ending
        await self._registry.heartbeats.write_available(left_on(ended.remaining))
        return ended.reservations

    async def renew(self, request: ReservationRenew) -> Reservation:
        """Let a lease begin anew, also late, as long as it has not been ended.

        Raises:
            ReservationNotFound: There is no such reservation.
            StaleFence: It is over, or has another fence.
        """
        renewed = await self._rows.renew(
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
        released = await self._end(self._rows.release(request.reservation_id, request.fence))
        if released:
            return released[0]
        known = await self._rows.show(request.reservation_id)
        is_same = known is not None and request.fence in (None, known.fence)
        if known is not None and is_same and known.state == "released":
            return known
        raise await self._stale(request.reservation_id, request.fence)

    async def reservation(self, reservation_id: UUID) -> Reservation:
        """Return one that is held, or ended within the last day.

        Raises:
            ReservationNotFound: There is no such reservation.
        """
        known = await self._rows.show(reservation_id)
        if known is None:
            raise _not_found(reservation_id)
        return known

    async def reservations(self, wanted: ReservationList) -> Reservations:
        """Return those that fit, newest first."""
        return await self._rows.list(wanted)

    async def _stale(self, reservation_id: UUID, fence: int | None) -> CapacityRefused:
        known = await self._rows.show(reservation_id)
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


def left_on(agents: Iterable[Reserved]) -> dict[Reserved, Available]:
    """Return what reservations leave of agents, to be written down."""
    return {
        one: room(document(one.resource_metrics), mapping_of(one.reserved)).available
        for one in agents
    }


class _RolledBackError(Exception):
    """Nothing is reserved: the transaction is rolled back."""


async def _lock(reserving: Reserving, choice: CapacityReserve, wanted: Wanted) -> list[Candidate]:
    """Lock agents that fit, as many as are wanted if there are so many; else some."""
    if choice.agent_id is not None:
        one = await reserving.lock_agent(choice.agent_id)
        return [one] if one is not None and fits(one, wanted) else []
    chosen: list[Candidate] = []
    locked: list[UUID] = []
    hosts: set[str] = set()
    while len(chosen) < choice.count:
        missing = choice.count - len(chosen)
        candidates = await reserving.lock(wanted.needs, missing, locked)
        for one in candidates:
            is_apart = not choice.distinct_hosts or _host(one) not in hosts
            if is_apart and fits(one, wanted):
                hosts.add(_host(one))
                chosen.append(one)
        if len(candidates) < missing:
            break
        locked += [one.agent_id for one in candidates]
    return chosen


def _taken(candidate: Candidate, wanted: Wanted) -> Taken:
    entry = allocate(candidate, wanted)
    assert entry is not None, "it was judged to fit, and is locked"
    reserved = {**candidate.reserved, _NEW: entry}
    return Taken(
        candidate.agent_id,
        entry,
        {
            "agent_id": str(candidate.agent_id),
            "hostname": candidate.hostname,
            "pool_name": candidate.pool_name,
            "gpus": entry["chosen"],
        },
        room(candidate.metrics, reserved).available,
    )


_NEW = "new"
"""Stands for a reservation that has no id and no fence yet."""


def _host(candidate: Candidate) -> str:
    return candidate.hostname or str(candidate.agent_id)


def _digest(request: CapacityReserve) -> bytes:
    return hashlib.sha256(request.model_dump_json().encode()).digest()


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
