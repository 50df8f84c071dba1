"""Asks for capacity over AMQP: the library class of whoever sends jobs to machines.

    async with PlannerClient.open("amqp://user:password@host/vhost") as planner:
        offers = await planner.find(CapacityQuery(min_gpu_vram_gb=20))
        async with planner.reserve(CapacityReserve(holder="me", ...)) as held:
            ...

One connection, one server-named reply queue, any number of questions at once. When the
connection breaks, open questions are asked again on the next connection, until their deadline.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

from chiffon.contract.messages import (
    CAPACITY_FIND,
    CAPACITY_RELEASE,
    CAPACITY_RENEW,
    CAPACITY_RESERVE,
    CAPACITY_SHOW,
    CAPACITY_WAIT,
    RESERVATION_LIST,
    RESERVATION_SHOW,
    AgentCapacity,
    CapacityOffers,
    CapacityQuery,
    CapacityReserve,
    CapacityShow,
    CapacityWait,
    Reservation,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
    Reservations,
    ReservationShow,
)
from chiffon.errors import (
    AgentNotFoundError,
    BusRefused,
    BusUnavailable,
    CapacityError,
    CapacityRefused,
    CapacityTimeout,
    InsufficientCapacity,
    NoResponders,
    StaleFence,
)
from chiffon.planner.events import Event, following
from chiffon.planner.held_reservation import HeldReservation, now
from chiffon.planner.rpc import RpcClient
from chiffon.settings import load

log = logging.getLogger(__name__)

ASK_TO_WAIT_AGAIN_SECONDS = 30.0
WAIT_GRACE_SECONDS = 5.0
"""For the answer that time is up."""

WAIT_PAUSE_SECONDS = 1.0
TRY_SECONDS = 5.0
"""How often room is tried for of which the wait queue knows only a part."""

LONGEST_WAIT_SECONDS = 86_400.0


class PlannerClient:
    """Capacity questions over AMQP. Made by ``open``."""

    def __init__(self, url: str, name: str) -> None:
        self._url, self._name = url, name
        self._rpc = RpcClient(url, name)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str | None = None, *, name: str = "planner"
    ) -> AsyncIterator["PlannerClient"]:
        """Open a planner; it connects in the background and stays connected.

        Args:
            url: The broker; several hosts allowed. By default the one that every command uses:
                ``CHIFFON_AMQP_URL``, else that of a ``chiffon up`` that runs on this machine.
            name: Shown as the connection's name in the management UI.

        Raises:
            BadConfiguration: Not an AMQP URL, or a setting that cannot work.
        """
        planner = cls(load().amqp_url.get_secret_value() if url is None else url, name)
        async with planner._rpc:
            yield planner

    async def find(
        self, query: CapacityQuery | None = None, *, timeout: float = 5.0
    ) -> CapacityOffers:
        """Return the agents that can take ``query`` now, best first.

        One question and one reply through the broker. Safe to call concurrently.

        Args:
            query: The needs; cores are whole cores, sizes GiB. Default: any desktop agent.
            timeout: Seconds from call to reply, above zero. Also the question's time to live, so
                no responder works for a caller that has gone.

        Returns:
            Zero to ``query.limit`` offers; ``total_matches`` counts all. ``as_of`` is UTC.

        Raises:
            NoResponders: Nobody is listening. Known at once, without waiting.
            CapacityTimeout: Nothing came back within ``timeout``.
            CapacityRefused: The responder declined; ``code`` says why.
            BusRefused: The broker does not let us in, or not ask.
            BusUnavailable: The broker could not be reached within ``timeout``.
        """
        question = query if query is not None else CapacityQuery()
        return await self._rpc.call(CAPACITY_FIND, question, CapacityOffers, timeout)

    async def show(self, agent_id: UUID, *, timeout: float = 5.0) -> AgentCapacity:
        """Return what one agent last reported.

        Raises:
            AgentNotFoundError: The responder knows no such agent.
            NoResponders, CapacityTimeout, CapacityRefused, BusUnavailable: As ``find``.
        """
        question = CapacityShow(agent_id=agent_id)
        try:
            return await self._rpc.call(CAPACITY_SHOW, question, AgentCapacity, timeout)
        except CapacityRefused as error:
            if error.code == "agent_not_found":
                raise AgentNotFoundError(agent_id) from None
            raise

    @asynccontextmanager
    async def reserve(
        self, request: CapacityReserve, *, timeout: float = 5.0, wait_seconds: float = 0.0
    ) -> AsyncIterator[HeldReservation]:
        """Reserve room while the context is open: it is renewed, and released at the end.

            async with planner.reserve(request) as held:
                ...  # stop when held.lost is set

        Args:
            request: What to reserve. Whoever comes again with its key, after a crash say, gets the
                same reservation.
            timeout: Seconds for each question to be answered.
            wait_seconds: For how long to wait in the queue if there is no such room now.

        Raises:
            InsufficientCapacity: Nobody has that room, also after ``wait_seconds``.
            StaleFence: The key belongs to a reservation that is over.
            IdempotencyMismatch: The key belongs to another request.
            NoResponders, CapacityTimeout, CapacityRefused, BusUnavailable: As ``find``.
        """
        reservation, sent = await self._reserve_or_wait(request, timeout, wait_seconds)
        if reservation.ended_at is not None:
            raise StaleFence(
                "stale_fence",
                f"the reservation of idempotency_key {request.idempotency_key} is over:"
                f" {reservation.reason}; a new intent needs a new key",
            )
        renewal = ReservationRenew(
            reservation_id=reservation.reservation_id, fence=reservation.fence
        )
        held = HeldReservation(
            reservation, sent, lambda seconds: self.renew(renewal, timeout=seconds)
        )
        renewing = asyncio.create_task(held.keep(), name=f"renews {reservation.reservation_id}")
        try:
            yield held
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            if not held.lost.is_set():
                await self._give_back(held.reservation, timeout)

    async def reserve_once(self, request: CapacityReserve, *, timeout: float = 5.0) -> Reservation:
        """Reserve room, without renewing it: for who renews and releases by itself.

        Raises:
            InsufficientCapacity: Nobody has that room.
            IdempotencyMismatch: The key belongs to another request.
            NoResponders, CapacityTimeout, CapacityRefused, BusUnavailable: As ``find``.
        """
        return await self._rpc.call(CAPACITY_RESERVE, request, Reservation, timeout)

    async def renew(self, request: ReservationRenew, *, timeout: float = 5.0) -> Reservation:
        """Let a lease begin anew.

        Raises:
            ReservationNotFound: There is no such reservation.
            StaleFence: It is over, or has another fence.
            NoResponders, CapacityTimeout, CapacityRefused, BusUnavailable: As ``find``.
        """
        return await self._rpc.call(CAPACITY_RENEW, request, Reservation, timeout)

    async def release(self, request: ReservationRelease, *, timeout: float = 5.0) -> Reservation:
        """Give room back; raises what ``renew`` does."""
        return await self._rpc.call(CAPACITY_RELEASE, request, Reservation, timeout)

    async def reservation(self, reservation_id: UUID, *, timeout: float = 5.0) -> Reservation:
        """Return a reservation that is held, or ended within the last day; raises as ``renew``."""
        question = ReservationShow(reservation_id=reservation_id)
        return await self._rpc.call(RESERVATION_SHOW, question, Reservation, timeout)

    async def reservations(
        self, wanted: ReservationList | None = None, *, timeout: float = 5.0
    ) -> Reservations:
        """Return reservations, newest first; by default those that are held."""
        question = wanted if wanted is not None else ReservationList()
        return await self._rpc.call(RESERVATION_LIST, question, Reservations, timeout)

    async def wait(self, question: CapacityWait) -> CapacityOffers:
        """Wait in the queue until something fits, or for ``question.timeout_seconds``.

        The position is kept when the connection breaks, and when the responder dies.

        Returns:
            The offers; none if time was up.

        Raises:
            NoResponders, CapacityRefused, BusRefused: As ``find``.
            CapacityTimeout: Nobody answered, not even that time was up.
        """
        deadline = time.monotonic() + question.timeout_seconds
        wait_id = question.wait_id or uuid4()
        is_first = True
        while True:
            left = deadline - time.monotonic()
            asked = question.model_copy(
                update={"wait_id": wait_id, "timeout_seconds": max(left, 0.001)}
            )
            # Asked again now and then: the same wait keeps its position, should it have been lost.
            is_last = left <= ASK_TO_WAIT_AGAIN_SECONDS
            patience = max(left, 0.0) + WAIT_GRACE_SECONDS if is_last else ASK_TO_WAIT_AGAIN_SECONDS
            try:
                return await self._rpc.call(CAPACITY_WAIT, asked, CapacityOffers, patience)
            except CapacityTimeout:
                if is_last:
                    raise
            except (NoResponders, CapacityRefused, BusUnavailable) as error:
                # Who has asked once is in the queue, which outlives responder and broker.
                if is_first or left <= 0 or not _is_passing(error):
                    raise
                await asyncio.sleep(min(WAIT_PAUSE_SECONDS, left))
            is_first = False

    async def _reserve_or_wait(
        self, request: CapacityReserve, timeout: float, wait_seconds: float
    ) -> tuple[Reservation, float]:
        """Return the reservation, and when the request was sent."""
        deadline = time.monotonic() + wait_seconds
        wait_id = uuid4()
        needs = request.needs().model_dump(exclude={"limit"})
        # The wait queue knows the needs of one agent; whatever else is wanted has to be tried.
        is_simple = request.count == request.gpus == 1 and not (
            request.alternatives or request.agent_id
        )
        while True:
            sent = now()
            try:
                return await self.reserve_once(request, timeout=timeout), sent
            except InsufficientCapacity:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
            patience = min(left, LONGEST_WAIT_SECONDS if is_simple else TRY_SECONDS)
            offers = await self.wait(
                CapacityWait(**needs, wait_id=wait_id, timeout_seconds=patience)
            )
            if offers.agents and not is_simple:
                await asyncio.sleep(min(WAIT_PAUSE_SECONDS, left))

    async def _give_back(self, reservation: Reservation, timeout: float) -> None:
        release = ReservationRelease(
            reservation_id=reservation.reservation_id, fence=reservation.fence
        )
        try:
            await self.release(release, timeout=timeout)
        except (CapacityError, BusUnavailable) as error:
            log.warning("not released, its lease ends by itself: %s", error)

    @asynccontextmanager
    async def watch(self, agent_id: UUID | None = None) -> AsyncIterator[AsyncIterator[Event]]:
        """Follow events: ``async with planner.watch() as events: async for event in events``.

        An event is published after the commit that it reports. While the broker is away none
        come: ask ``find`` or ``show`` then what is true now.

        Args:
            agent_id: Only this agent's; default: every agent's, and those of pools.

        Raises:
            BusRefused: The broker does not let us in, or not read.
        """
        async with following(self._url, name=f"{self._name} events", agent_id=agent_id) as events:
            yield events


def _is_passing(error: Exception) -> bool:
    """Whether it may be over in a moment, and nobody has to do anything about it."""
    if isinstance(error, CapacityRefused):
        return error.code in ("unavailable", "expired")
    return not isinstance(error, BusRefused)
