"""A planner that holds room is killed, or frozen for longer than its lease."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from chiffon.capacity.reservations import ReservationService
from chiffon.contract.messages import Reservation
from chiffon.registry.registry import Registry
from tests.fixtures.rooms import gpu, record, request, rig
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

LEASE_SECONDS = 2.0


@contextmanager
def holder(amqp_url: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fixtures.holder", amqp_url, str(LEASE_SECONDS)],
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            started.kill()


async def line(of: "subprocess.Popen[str]") -> str:
    assert of.stdout is not None
    async with asyncio.timeout(30):
        return (await asyncio.to_thread(of.stdout.readline)).strip()


async def test_a_killed_planner_gives_its_room_back_within_its_lease(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """A process starts, and its lease of seconds is waited for."""
    service = ReservationService(registry)
    await record(registry, rig(gpu(0, 24.0), interval_seconds=60.0))
    async with orchestrating(amqp_url, database_url):
        with holder(amqp_url) as planner:
            held = UUID(await line(planner))

            async def lives_by_its_renewals() -> bool:
                found = await service.reservation(held)
                return (found.expires_at - found.created_at).total_seconds() > 2 * LEASE_SECONDS

            await until(lives_by_its_renewals, "renewals for a whole lease")
            planner.kill()
            assert planner.wait() == -signal.SIGKILL
            killed = time.monotonic()

            async def is_over() -> Reservation | None:
                found = await service.reservation(held)
                return found if found.state == "expired" else None

            await until(is_over, "its room is free")
            assert time.monotonic() - killed < LEASE_SECONDS + 15
            await service.reserve(request(gpu_vram_gb=20.0))


async def test_a_planner_that_was_frozen_for_longer_than_its_lease_learns_that_it_has_lost(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """Meanwhile another one has the room, with a larger fence."""
    service = ReservationService(registry)
    await record(registry, rig(gpu(0, 24.0), interval_seconds=60.0))
    async with orchestrating(amqp_url, database_url):
        with holder(amqp_url) as planner:
            held = UUID(await line(planner))
            planner.send_signal(signal.SIGSTOP)

            async def is_over() -> bool:
                return (await service.reservation(held)).state == "expired"

            await until(is_over, "its lease is over")
            other = await service.reserve(request(gpu_vram_gb=20.0, lease_seconds=600.0))
            planner.send_signal(signal.SIGCONT)
            said = await line(planner)

            assert said.startswith("lost: ")
            assert other.fence > (await service.reservation(held)).fence
            await asyncio.to_thread(planner.wait, 30)
            assert (await service.reservation(other.reservation_id)).state == "held"
