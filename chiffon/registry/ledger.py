"""Reservations as PostgreSQL has them. The statements, and why they are right: ``claims``."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from chiffon.errors import RowRefused
from chiffon.messages import CapacityReserve, Reservation, ReservationList, Reservations
from chiffon.registry import Registry
from chiffon.registry.claims import (
    ASK_AGAIN,
    CLAIM,
    CLAIM_IN_ORDER,
    CLAIM_IN_POOL,
    CLAIM_ON,
    CLAIM_ON_DISTINCT_HOSTS,
    EXPIRE,
    FITTING,
    FITTING_ON_DISTINCT_HOSTS,
    LIST,
    PURGE,
    RELEASE,
    RELEASE_UNDELIVERED,
    RENEW,
    REVOKE,
    REVOKE_ON,
    SHOW,
)
from chiffon.registry.offers import asked, has_rare_words, taken

KEPT_SECONDS = 86_400.0
"""How long a reservation that has ended is still known, for who asks again with its key."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A reservation, and how often it had been asked for when this was read.

    ``is_same``: of one that was known already, whether it was asked for in the same words.
    """

    reservation: Reservation
    asked: int
    is_same: bool = True


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was reserved. ``is_contended``: something fits, and others are at it just now."""

    is_contended: bool


class Ledger:
    """Who holds what. Safe to use from many tasks and processes at once.

    Every method raises what those of ``Registry`` do.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def claim(
        self, request: CapacityReserve, *, alternative: int = 0, asked_for: CapacityReserve
    ) -> Claim | Refused:
        """Reserve what a request asks for, if that is free: one statement, all or nothing.

        Args:
            request: What to take, one of the choices of ``asked_for``.
            alternative: Which of them it is.
            asked_for: The request as it came, which the same key must come with again.
        """
        digest = _digest(asked_for)
        row: asyncpg.Record | None = None
        try:
            row = await self._claim(
                request,
                uuid4(),
                request.holder,
                request.idempotency_key,
                digest,
                request.lease_seconds,
                alternative,
            )
        except RowRefused as error:
            # Another one made the reservation of this key at this moment, or a gang fell apart.
            if "reservation_key" not in str(error) and '"fence"' not in str(error):
                raise
        if row is not None and row["reservation_id"] is not None:
            return Claim(_reservation(row), row["asked"])
        if row is None or row["is_known"]:
            known = await self._registry.fetch(
                ASK_AGAIN, request.holder, request.idempotency_key, digest
            )
            if not known:
                return Refused(is_contended=True)
            is_same = known[0]["request_hash"] == digest
            return Claim(_reservation(known[0]), known[0]["asked"], is_same)
        return Refused(is_contended=await self._fits(request))

    async def _claim(self, request: CapacityReserve, *arguments: Any) -> asyncpg.Record:
        """Run the statement of claims that has the best plan for this one."""
        needs, run = request.needs(), self._registry.fetch
        if request.agent_id is not None:
            statement = CLAIM_ON
        elif request.distinct_hosts and request.count > 1:
            statement = CLAIM_ON_DISTINCT_HOSTS
        elif has_rare_words(needs):
            statement = CLAIM
        else:
            statement = CLAIM_IN_ORDER if needs.pool_name is None else CLAIM_IN_POOL
            run = self._registry.claim
        [row] = await run(statement, *asked(needs, request.count), *taken(request), *arguments)
        return row

    async def _fits(self, request: CapacityReserve) -> bool:
        is_apart = request.distinct_hosts and request.count > 1 and request.agent_id is None
        [row] = await self._registry.fetch(
            FITTING_ON_DISTINCT_HOSTS if is_apart else FITTING,
            *asked(request.needs(), request.count),
            *taken(request),
        )
        return bool(row["is_enough"])

    async def renew(
        self, reservation_id: UUID, fence: int | None = None, lease_seconds: float | None = None
    ) -> Reservation | None:
        """Let its lease begin anew; ``None`` if it is not held, or has another fence."""
        rows = await self._registry.fetch(RENEW, reservation_id, lease_seconds, fence)
        return _reservation(rows[0]) if rows else None

    async def release(self, reservation_id: UUID, fence: int | None = None) -> Reservation | None:
        """End it; ``None`` if it is not held, or has another fence."""
        rows = await self._registry.fetch(RELEASE, reservation_id, fence)
        return _reservation(rows[0]) if rows else None

    async def release_undelivered(self, claim: Claim) -> bool:
        """End one whose answer nobody took, if this claim made it and it is as it was made.

        A second answer that finds nobody tells nothing: the first may have arrived. The key is
        free again: who asks once more gets a new one.

        Returns:
            Whether it was ended.
        """
        if claim.asked > 1:
            return False
        rows = await self._registry.fetch(RELEASE_UNDELIVERED, claim.reservation.reservation_id)
        return bool(rows)

    async def show(self, reservation_id: UUID) -> Reservation | None:
        """Return one that is held, or ended within the last day, or ``None``."""
        rows = await self._registry.fetch(SHOW, reservation_id)
        return _reservation(rows[0]) if rows else None

    async def listed(self, wanted: ReservationList) -> Reservations:
        """Return those that fit, newest first."""
        rows = await self._registry.fetch(
            LIST, wanted.state, wanted.holder, wanted.agent_id, wanted.limit
        )
        found = [_reservation(row) for row in rows if row["reservation_id"] is not None]
        return Reservations(as_of=rows[0]["listed_at"], reservations=found)

    async def expire(self) -> list[Reservation]:
        """End those that were not renewed in time, at most 500; returns them."""
        return [_reservation(row) for row in await self._registry.fetch(EXPIRE)]

    async def revoke(self, offline_seconds: float) -> list[Reservation]:
        """End those on agents that nothing can be held on, at most 500; returns them.

        Args:
            offline_seconds: For how long what is held on an agent outlives its going offline.
        """
        return [_reservation(row) for row in await self._registry.fetch(REVOKE, offline_seconds)]

    async def revoke_on(self, agent_ids: Sequence[UUID]) -> list[Reservation]:
        """End those on these agents, which are to be forgotten; returns them."""
        return [_reservation(row) for row in await self._registry.fetch(REVOKE_ON, agent_ids)]

    async def purge(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Forget those that ended longer ago than that."""
        while await self._registry.fetch(PURGE, kept_seconds):
            pass


def _digest(request: CapacityReserve) -> bytes:
    return hashlib.sha256(request.model_dump_json().encode()).digest()


def _reservation(row: asyncpg.Record) -> Reservation:
    fields: dict[str, Any] = dict(row)
    places = json.loads(fields["places"])
    first = places[0]
    same = {name: fields[name] for name in Reservation.model_fields if name in fields}
    where = {name: first[name] for name in ("agent_id", "hostname", "gpus")}
    return Reservation.model_validate({**same, **where, "places": places})
