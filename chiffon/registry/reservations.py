"""Reservations as PostgreSQL has them; the statements are in ``sql/reservations.sql``."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from chiffon.contract.messages import (
    CapacityQuery,
    CapacityReserve,
    Reservation,
    ReservationList,
    Reservations,
)
from chiffon.registry.offers import is_rare, wanted
from chiffon.registry.pool import Pool, Transaction, one_of
from chiffon.registry.rows import Available, Candidate, Reserved

KEPT_SECONDS = 86_400.0
"""How long a reservation that has ended is still known, for who asks again with its key."""

RESERVING_AT_ONCE = 6
"""A commit waits for the disk, and ``find`` must not wait for it: they share a pool."""


@dataclass(frozen=True, slots=True)
class Made:
    """A reservation, and how often it had been requested when this was read.

    ``is_same``: of one that was known already, whether it was requested in the same words.
    """

    reservation: Reservation
    requests: int
    is_same: bool = True


@dataclass(frozen=True, slots=True)
class Ended:
    """Reservations that were ended, and agents on which others remain."""

    reservations: list[Reservation]
    remaining: list[Reserved]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a reservation takes of one agent, and what that leaves.

    ``entry`` goes into the column ``reserved``, ``place`` into the reservation.
    """

    agent_id: UUID
    entry: Mapping[str, Any]
    place: Mapping[str, Any]
    available: Available


class Reserving:
    """One transaction that locks agents, and writes a reservation of room on them."""

    def __init__(self, transaction: Transaction, request: CapacityReserve) -> None:
        self._transaction = transaction
        self._key: dict[str, Any] = {
            "holder": request.holder,
            "idempotency_key": request.idempotency_key,
        }

    async def lock(
        self, query: CapacityQuery, most: int, without: Sequence[UUID]
    ) -> list[Candidate]:
        """Lock the best agents that may fit, and that nobody else is at.

        Args:
            query: The needs.
            most: How many at most.
            without: Leave these out.

        Returns:
            Best first; none if the key came before.
        """
        name = "lock_candidates" if query.pool_name is None else "lock_candidates_in_pool"
        rows = await self._transaction.fetch(
            name, **self._key, **wanted(query), most=most, without=without
        )
        return [Candidate.of(row) for row in rows]

    async def lock_agent(self, agent_id: UUID) -> Candidate | None:
        """Lock one agent; ``None`` if there is none, somebody is at it, or the key came before."""
        rows = await self._transaction.fetch("lock_candidate", **self._key, agent_id=agent_id)
        return Candidate.of(rows[0]) if rows else None

    async def write(
        self,
        request: CapacityReserve,
        digest: bytes,
        taken: Sequence[Taken],
        *,
        alternative: int,
    ) -> Made | None:
        """Write the reservation of what is taken; ``None`` if its key was written meanwhile.

        Args:
            request: One of the choices of what was requested.
            digest: Of the request as it came.
            taken: What it takes, of agents that are locked, in the order of their ids.
            alternative: Which choice it is.
        """
        rows = await self._transaction.fetch(
            "write_reservation",
            **self._key,
            reservation_id=uuid4(),
            request_hash=digest,
            lease_seconds=request.lease_seconds,
            gpu_vram_gb=request.gpu_vram_gb,
            cpu_cores=request.cpu_cores,
            memory_gb=request.memory_gb,
            places=json.dumps([one.place for one in taken]),
            alternative=alternative,
            agent_ids=[one.agent_id for one in taken],
            taken=[json.dumps(one.entry) for one in taken],
            vram_gb=[one.available.vram_gb for one in taken],
            single_gpu_vram_gb=[one.available.single_gpu_vram_gb for one in taken],
            cores=[one.available.cores for one in taken],
            memory_left_gb=[one.available.memory_gb for one in taken],
        )
        return Made(_reservation(rows[0]), rows[0]["requests"]) if rows else None


class ReservationRows:
    """Who holds what. Safe to use from many tasks and processes at once.

    Raises what ``Registry`` does.
    """

    def __init__(self, pool: Pool, in_order: Pool) -> None:
        self._pool = pool
        self._in_order = in_order
        self._reserving = asyncio.Semaphore(RESERVING_AT_ONCE)

    @asynccontextmanager
    async def reserving(self, request: CapacityReserve) -> AsyncIterator[Reserving]:
        """Provide a transaction to reserve in: committed at the end, rolled back on an error."""
        pool = self._pool if is_rare(request.needs()) or request.agent_id else self._in_order
        async with one_of(self._reserving), pool.transaction() as transaction:
            yield Reserving(transaction, request)

    async def request_again(self, request: CapacityReserve, digest: bytes) -> Made | None:
        """Return the reservation of a key that came before; ``None`` if it did not."""
        rows = await self._pool.fetch(
            "request_again",
            holder=request.holder,
            idempotency_key=request.idempotency_key,
            request_hash=digest,
        )
        if not rows:
            return None
        is_same = rows[0]["request_hash"] == digest
        return Made(_reservation(rows[0]), rows[0]["requests"], is_same)

    async def renew(
        self, reservation_id: UUID, fence: int | None = None, lease_seconds: float | None = None
    ) -> Reservation | None:
        """Begin its lease anew; ``None`` if it is not held, or has another fence."""
        rows = await self._pool.fetch(
            "renew", reservation_id=reservation_id, lease_seconds=lease_seconds, fence=fence
        )
        return _reservation(rows[0]) if rows else None

    async def release(self, reservation_id: UUID, fence: int | None = None) -> Ended:
        """End it, unless it is not held or has another fence."""
        return await self._end("release", reservation_id=reservation_id, fence=fence)

    async def release_undelivered(self, reservation_id: UUID) -> Ended:
        """End one whose answer nobody took, if it is as it was made. Its key is free again."""
        return await self._end("release_undelivered", reservation_id=reservation_id)

    async def expire(self) -> Ended:
        """End those that were not renewed in time, at most 500."""
        return await self._end("expire")

    async def revoke(self, offline_seconds: float) -> Ended:
        """End those on agents that nothing can be held on, at most 500.

        Args:
            offline_seconds: For how long what is held on an agent outlives its going offline.
        """
        return await self._end("revoke", offline_seconds=offline_seconds)

    async def revoke_on(self, agent_ids: Sequence[UUID]) -> Ended:
        """End those on these agents, which are to be forgotten."""
        return await self._end("revoke_on", agent_ids=agent_ids)

    async def _end(self, name: str, **parameters: Any) -> Ended:
        rows = await self._pool.fetch(name, **parameters)
        remaining = json.loads((rows[0]["remaining"] if rows else None) or "[]")
        return Ended(
            [_reservation(row) for row in rows],
            [
                Reserved(
                    UUID(one["agent_id"]),
                    json.dumps(one["reserved"]),
                    json.dumps(one["resource_metrics"]),
                )
                for one in remaining
            ],
        )

    async def show(self, reservation_id: UUID) -> Reservation | None:
        """Return one that is held, or ended within the last day, or ``None``."""
        rows = await self._pool.fetch("show_reservation", reservation_id=reservation_id)
        return _reservation(rows[0]) if rows else None

    async def list(self, query: ReservationList) -> Reservations:
        """Return those that fit, newest first."""
        rows = await self._pool.fetch(
            "list_reservations",
            state=query.state,
            holder=query.holder,
            agent_id=query.agent_id,
            most=query.limit,
        )
        found = [_reservation(row) for row in rows if row["reservation_id"] is not None]
        return Reservations(as_of=rows[0]["listed_at"], reservations=found)

    async def purge(self, kept_seconds: float = KEPT_SECONDS) -> None:
        """Forget those that ended longer ago than that."""
        while await self._pool.fetch("purge_reservations", kept_seconds=kept_seconds):
            pass


def _reservation(row: asyncpg.Record) -> Reservation:
    fields: dict[str, Any] = dict(row)
    places = json.loads(fields["places"])
    first = places[0]
    same = {name: fields[name] for name in Reservation.model_fields if name in fields}
    where = {name: first[name] for name in ("agent_id", "hostname", "gpus")}
    return Reservation.model_validate({**same, **where, "places": places})
