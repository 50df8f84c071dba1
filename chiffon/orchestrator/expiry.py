"""The periodic pass that ends reservations: not renewed, or on an agent that is gone.

Any number of orchestrators may each make it: every reservation is ended by exactly one. What was
not renewed while broker, database or we ourselves were away has time to be renewed when they are
back.
"""

import logging
import time
from collections.abc import Sequence

from chiffon.capacity.reservations import ReservationService
from chiffon.contract.messages import Reservation
from chiffon.orchestrator.events import Events

log = logging.getLogger(__name__)

PURGE_SECONDS = 60.0


class Expiry:
    """Ends reservations.

    Args:
        reservations: Who ends them.
        events: Publishes which.
        offline_seconds: For how long what is held on an agent outlives its going offline.
    """

    def __init__(
        self, reservations: ReservationService, events: Events, *, offline_seconds: float = 300.0
    ) -> None:
        self._reservations = reservations
        self._events = events
        self._offline_seconds = offline_seconds
        self._purged = time.monotonic()

    async def end_due(self) -> Sequence[Reservation]:
        """Make one pass, and publish which it ended.

        Raises:
            RegistryUnavailable: The database is away.
        """
        ended = [
            *await self._reservations.expire(),
            *await self._reservations.revoke(self._offline_seconds),
        ]
        for one in ended:
            log.info(
                "reservation %s of %s is %s: %s",
                one.reservation_id,
                one.holder,
                one.state,
                one.reason,
            )
        self._events.reservations(ended)
        if time.monotonic() - self._purged > PURGE_SECONDS:
            self._purged = time.monotonic()
            await self._reservations.purge()
        return ended
