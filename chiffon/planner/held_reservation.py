"""A reservation while it is held: renewed in the background, given back at the end.

A lease is a promise of the other side, and the holder's clock is not the registry's. So the holder
takes it as over somewhat earlier than it is, counted on its own monotonic clock from when it sent
the request that was answered.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from chiffon.contract.messages import Reservation
from chiffon.errors import (
    BusUnavailable,
    CapacityError,
    ReservationNotFound,
    StaleFence,
)

log = logging.getLogger(__name__)

LEAST_MARGIN_SECONDS = 1.0
MARGIN_SHARE = 0.05

AGAIN_SECONDS = 0.2
"""After a renewal that failed."""

Renew = Callable[[float], Awaitable[Reservation]]


def now() -> float:
    """Return the time of the holder's clock in seconds: it runs on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _left(reservation: Reservation) -> float:
    """Return what was left of its lease when it was answered: less than all of an old one."""
    return max((reservation.expires_at - reservation.as_of).total_seconds(), 0.0)


def usable_seconds(lease_seconds: float) -> float:
    """Return for how long a holder may rely on a lease, from when it sent the request.

    The margin is 5 % of the lease and at least 1 s, but never more than a quarter of the lease.
    """
    margin = max(LEAST_MARGIN_SECONDS, MARGIN_SHARE * lease_seconds)
    return lease_seconds - min(margin, lease_seconds / 4)


class HeldReservation:
    """A reservation while it is held. Made by ``PlannerClient.reserve``.

    ``reservation`` is what the last answer said. ``lost`` is set as soon as the room must not be
    used any more: it was ended by others, or could not be renewed in time.

    Args:
        reservation: As it was answered.
        sent: When the request was sent, as ``now`` tells it.
        renew: Renews it, within as many seconds as it is given.
    """

    def __init__(self, reservation: Reservation, sent: float, renew: Renew) -> None:
        self.reservation = reservation
        self.lost = asyncio.Event()
        self.why_lost: str | None = None
        self._renew = renew
        self._until = sent + usable_seconds(_left(reservation))

    @property
    def seconds_left(self) -> float:
        """For how long the room may still be relied on; 0 once it is lost."""
        return 0.0 if self.lost.is_set() else max(self._until - now(), 0.0)

    async def keep(self) -> None:
        """Renew at a third of the lease, and again and again while that fails, until it is lost."""
        while not self.lost.is_set():
            await asyncio.sleep(_left(self.reservation) / 3 * random.uniform(0.9, 1.0))
            while not self.lost.is_set():
                if await self._renewed():
                    break

    async def _renewed(self) -> bool:
        left = self.seconds_left
        if left <= 0:
            self._lose("it could not be renewed in time")
            return False
        sent = now()
        try:
            self.reservation = await self._renew(min(left, self.reservation.lease_seconds / 3))
        except (StaleFence, ReservationNotFound) as error:
            self._lose(error.message)
            return False
        except (CapacityError, BusUnavailable) as error:
            log.warning("reservation %s not renewed: %s", self.reservation.reservation_id, error)
            await asyncio.sleep(min(AGAIN_SECONDS, self.seconds_left))
            return False
        except Exception as error:
            log.exception("renewing failed in an unforeseen way")
            self._lose(f"renewing failed: {type(error).__name__}")
            return False
        self._until = sent + usable_seconds(_left(self.reservation))
        return True

    def _lose(self, why: str) -> None:
        log.error("lost reservation %s: %s", self.reservation.reservation_id, why)
        self.why_lost = why
        self.lost.set()
