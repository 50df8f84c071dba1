"""A holder's own view of its lease, without a broker."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from chiffon.contract.messages import Reservation
from chiffon.errors import BusUnavailable, StaleFence
from chiffon.planner.held_reservation import HeldReservation, now, usable_seconds

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def reservation(lease_seconds: float, left_seconds: float | None = None) -> Reservation:
    left = lease_seconds if left_seconds is None else left_seconds
    return Reservation(
        reservation_id=uuid4(),
        holder="me",
        idempotency_key=uuid4(),
        state="held",
        reason=None,
        fence=1,
        lease_seconds=lease_seconds,
        created_at=NOW,
        expires_at=NOW + timedelta(seconds=left),
        ended_at=None,
        as_of=NOW,
        agent_id=uuid4(),
        hostname="rig-7",
        gpus=[],
        gpu_vram_gb=0.0,
        cpu_cores=1,
        memory_gb=0.0,
        places=[],
    )


@pytest.mark.parametrize(
    ("lease_seconds", "usable"),
    [(1.0, 0.75), (4.0, 3.0), (10.0, 9.0), (60.0, 57.0), (600.0, 570.0)],
)
def test_a_lease_is_relied_on_for_less_than_it_lasts(lease_seconds: float, usable: float) -> None:
    assert usable_seconds(lease_seconds) == usable


async def test_what_is_left_of_an_old_lease_counts_and_not_all_of_it() -> None:
    async def never(_: float) -> Reservation:
        raise AssertionError("nobody renews here")

    holding = HeldReservation(reservation(600.0, left_seconds=10.0), now(), never)

    assert 8.0 < holding.seconds_left <= 9.0


async def test_a_renewal_that_fails_is_tried_again_until_the_lease_is_over() -> None:
    tries = 0

    async def fail(_: float) -> Reservation:
        nonlocal tries
        tries += 1
        raise BusUnavailable("the broker is away")

    holding = HeldReservation(reservation(1.2), now(), fail)
    async with asyncio.timeout(20):
        await holding.keep()

    assert holding.lost.is_set()
    assert holding.why_lost == "it could not be renewed in time"
    assert tries > 1


async def test_a_reservation_that_is_over_is_lost_at_once() -> None:
    async def over(_: float) -> Reservation:
        raise StaleFence("stale_fence", "reservation x is over")

    holding = HeldReservation(reservation(1.0), now(), over)
    async with asyncio.timeout(20):
        await holding.keep()

    assert holding.why_lost == "reservation x is over"
    assert holding.seconds_left == 0.0
