"""Room is taken and given back while responders and the database are killed at every step."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon import PlannerClient
from chiffon.contract.messages import CapacityReserve, Reservation, ReservationRelease
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import (
    BusUnavailable,
    CapacityError,
    CapacityRefused,
    InsufficientCapacity,
)
from tests.faults.conftest import Survives
from tests.faults.lab import Lab
from tests.fixtures.rooms import broken
from tests.fixtures.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="session")]

TAKERS = 4
KEPT = 3


class Taker:
    """A planner that takes room, keeps some and gives the rest back.

    Each request is made again with the same key until it is answered; what was answered is known,
    and so is what must be held at the end.
    """

    def __init__(self, amqp_url: str) -> None:
        self._url = amqp_url
        self._stopping = asyncio.Event()
        self.holder = f"taker {uuid4()}"
        self.kept: dict[UUID, Reservation] = {}
        self.keys: set[UUID] = set()
        self.answered = self.again = 0

    async def run(self) -> None:
        """Take and give back until ``stop``; ends with all requests answered."""
        async with PlannerClient.open(self._url) as planner:
            while not self._stopping.is_set():
                wanted = CapacityReserve(
                    holder=self.holder, idempotency_key=uuid4(), cpu_cores=1, lease_seconds=600.0
                )
                self.keys.add(wanted.idempotency_key)
                made = await self._insist(partial(planner.reserve_once, wanted, timeout=1.0))
                assert made.state == "held", made
                assert made.reservation_id not in self.kept
                self.kept[made.reservation_id] = made
                if len(self.kept) > KEPT:
                    oldest = next(iter(self.kept))
                    release = ReservationRelease(
                        reservation_id=oldest, fence=self.kept[oldest].fence
                    )
                    await self._insist(partial(planner.release, release, timeout=1.0))
                    del self.kept[oldest]

    def stop(self) -> None:
        self._stopping.set()

    async def _insist(self, ask: Callable[[], Awaitable[Reservation]]) -> Reservation:
        while True:
            try:
                answer = await ask()
            except (CapacityError, BusUnavailable) as error:
                is_final = isinstance(error, CapacityRefused) and error.code not in (
                    "unavailable",
                    "expired",
                    "insufficient_capacity",  # the agents are silent while the database is away
                )
                if is_final:
                    raise
                self.again += not isinstance(error, InsufficientCapacity)
                await asyncio.sleep(0.05)
            else:
                self.answered += 1
                return answer


async def suffer(lab: Lab, fault: Callable[[], Awaitable[None]]) -> None:
    """Let takers run around a fault, and check that nothing answered is lost or doubled."""
    takers = [Taker(lab.amqp_url) for _ in range(TAKERS)]
    running = [asyncio.create_task(taker.run()) for taker in takers]
    await fault()
    before = [taker.answered for taker in takers]

    async def go_on() -> bool:
        return all(one.answered > count for one, count in zip(takers, before, strict=True))

    await until(go_on, "each is answered after the fault")
    for taker in takers:
        taker.stop()
    async with asyncio.timeout(60):
        await asyncio.gather(*running)
    database = await asyncpg.connect(asyncpg_url(lab.database_url))
    try:
        rows = await database.fetch("SELECT * FROM reservation WHERE state = 'held'")
        held = {row["reservation_id"]: row for row in rows}
        for taker in takers:
            theirs = {key for key, row in held.items() if row["holder"] == taker.holder}
            assert theirs == set(taker.kept), "what is held is what was answered, and no more"
            # What nobody took was given back, and its key is free again.
            made = await database.fetchval(
                "SELECT count(*) FROM reservation"
                " WHERE holder = $1 AND reason IS DISTINCT FROM 'undelivered'",
                taker.holder,
            )
            assert made <= len(taker.keys), "a key made two"
        assert await broken(database) == []
        async with AsyncExitStack() as stack:
            planner = await stack.enter_async_context(PlannerClient.open(lab.amqp_url))
            for reservation_id in held:
                await planner.release(ReservationRelease(reservation_id=reservation_id))
    finally:
        await database.close()


@pytest.mark.parametrize(
    "moment",
    [
        "before a reservation",
        "between reservation and answer",
        "between answer and acknowledgement",
        "before a release",
        "between release and answer",
    ],
)
async def test_a_responder_dies_at_every_step(lab: Lab, survives: Survives, moment: str) -> None:
    async def dying() -> None:
        one = lab.start_orchestrator("tests.faults.dying_orchestrator", moment)
        assert await asyncio.to_thread(one.wait, 60) == -signal.SIGKILL
        lab.orchestrators.remove(one)

    await survives(lab, f"reservations: killed {moment}", lambda: suffer(lab, dying))


async def test_the_database_is_killed_under_reservations(lab: Lab, survives: Survives) -> None:
    async def dying() -> None:
        await asyncio.sleep(1.0)
        for _ in range(2):
            lab.database.kill()
            await asyncio.sleep(0.5)
            lab.database.start()
            await asyncio.sleep(3.0)

    await survives(lab, "reservations: database killed (-9), twice", lambda: suffer(lab, dying))
