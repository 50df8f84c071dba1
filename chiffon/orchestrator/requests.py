"""Every question of the contract and who answers it; and every error as a refusal.

Transport is left to who asks this: ``responder``.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid5

from pydantic import BaseModel

from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import Capacity
from chiffon.contract import messages
from chiffon.contract.codec import decode
from chiffon.contract.messages import (
    CapacityQuery,
    CapacityReserve,
    CapacityShow,
    CapacityWait,
    ErrorReply,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    ReservationShow,
)
from chiffon.errors import AgentNotFoundError, BadMessage, CapacityRefused, RegistryUnavailable
from chiffon.orchestrator.wait_queue import WaitQueueServer
from chiffon.registry.reservations import Made
from chiffon.registry.wait_queue import ReplyAddress

log = logging.getLogger(__name__)

Answered = tuple[str, BaseModel | Made]
"""The type of the reply and its body; of a reservation that was made, its ``requests`` too."""

_WAITS = UUID("8d0f3a54-9f0c-4a55-8a1e-0c1f7a3f6b11")

_BODIES: dict[str, type[BaseModel]] = {
    messages.CAPACITY_FIND: CapacityQuery,
    messages.CAPACITY_SHOW: CapacityShow,
    messages.CAPACITY_WAIT: CapacityWait,
    messages.CAPACITY_RESERVE: CapacityReserve,
    messages.CAPACITY_RENEW: ReservationRenew,
    messages.CAPACITY_RELEASE: ReservationRelease,
    messages.RESERVATION_SHOW: ReservationShow,
    messages.RESERVATION_LIST: ReservationList,
}
KINDS = frozenset(_BODIES)
"""The types of all questions."""


class Requests:
    """Answers them, from the registry.

    Args:
        capacity: Who has room.
        reservations: Reserves and releases.
        waiting: Where those wait for whom there is none.
    """

    def __init__(
        self, capacity: Capacity, reservations: ReservationService, waiting: WaitQueueServer
    ) -> None:
        self._capacity = capacity
        self._reservations = reservations
        self._waiting = waiting
        self._answers: dict[str, Callable[[Any], Awaitable[Answered]]] = {
            messages.CAPACITY_FIND: self._find,
            messages.CAPACITY_SHOW: self._show,
            messages.CAPACITY_RESERVE: self._reserve,
            messages.CAPACITY_RENEW: self._renew,
            messages.CAPACITY_RELEASE: self._release,
            messages.RESERVATION_SHOW: self._reservation,
            messages.RESERVATION_LIST: self._list,
        }

    async def answer(self, kind: str | None, body: bytes, origin: ReplyAddress) -> Answered | None:
        """Return the answer; ``None`` if it is given later, by whoever serves the wait queue.

        Args:
            kind: The AMQP ``type`` of the question.
            body: As it came.
            origin: Where a later answer goes.

        Raises:
            Whatever keeps it from being answered; ``refusal`` puts that into words.
        """
        expected = _BODIES.get(kind or "")
        if expected is None:
            raise BadMessage(
                f"type {str(kind)[:64]!r} is not a capacity question", "unsupported_type"
            )
        question = decode(expected, body)
        if isinstance(question, CapacityWait):
            # One that is delivered again, as its responder died, is the same one.
            named = f"{origin.exchange}/{origin.key}/{origin.correlation_id}/{body!r}"
            wait_id = question.wait_id or uuid5(_WAITS, named)
            await self._waiting.join(wait_id, question, origin)
            return None
        return await self._answers[kind or ""](question)

    async def _find(self, query: CapacityQuery) -> Answered:
        return messages.CAPACITY_OFFERS, await self._capacity.find(query)

    async def _show(self, question: CapacityShow) -> Answered:
        return messages.CAPACITY_AGENT, await self._capacity.show(question.agent_id)

    async def _reserve(self, request: CapacityReserve) -> Answered:
        return messages.CAPACITY_RESERVATION, await self._reservations.reserve_counting(request)

    async def _renew(self, request: ReservationRenew) -> Answered:
        return messages.CAPACITY_RESERVATION, await self._reservations.renew(request)

    async def _release(self, request: ReservationRelease) -> Answered:
        return messages.CAPACITY_RESERVATION, await self._reservations.release(request)

    async def _reservation(self, question: ReservationShow) -> Answered:
        found = await self._reservations.reservation(question.reservation_id)
        return messages.CAPACITY_RESERVATION, found

    async def _list(self, question: ReservationList) -> Answered:
        found = await self._reservations.reservations(question)
        return messages.CAPACITY_RESERVATIONS, found


def refusal(error: Exception) -> ErrorReply:
    """Return what is answered where ``answer`` raised this."""
    match error:
        case CapacityRefused():
            return _reply(error.code, error.message, **error.details)
        case BadMessage():
            is_unknown = error.code == "unsupported_type"
            return _reply("unsupported_type" if is_unknown else "invalid_request", error)
        case AgentNotFoundError():
            return _reply("agent_not_found", error, agent_id=str(error.agent_id))
        case RegistryUnavailable():
            log.warning("cannot answer: %s", error)
            return _reply("unavailable", error)
    log.error("a capacity question failed", exc_info=error)
    return _reply("internal", f"the responder failed: {type(error).__name__}; see its log")


def _reply(code: str, message: object, **details: Any) -> ErrorReply:
    return ErrorReply.model_validate({"code": code, "message": str(message), "details": details})
