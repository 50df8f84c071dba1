"""The periodic pass that ends reservations: not renewed, or on an agent that is gone.

Any number of orchestrators may each run one: every reservation is ended by exactly one. What was
not renewed while broker, database or we ourselves were away has time to be renewed when they are
back; see ``registry.claims``.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from chiffon.errors import RegistryUnavailable
from chiffon.events import Events
from chiffon.messages import Reservation
from chiffon.registry import Registry
from chiffon.registry.ledger import Ledger

log = logging.getLogger(__name__)

PURGE_SECONDS = 60.0


class Expiry:
    """Ends reservations, every ``interval_seconds``.

    Args:
        registry: Where they are.
        events: Who is told.
        interval_seconds: Between two passes.
        offline_seconds: For how long what is held on an agent outlives its going offline.
    """

    def __init__(
        self,
        registry: Registry,
        events: Events,
        *,
        interval_seconds: float = 1.0,
        offline_seconds: float = 300.0,
    ) -> None:
        self._ledger = Ledger(registry)
        self._events = events
        self._interval = interval_seconds
        self._offline_seconds = offline_seconds
        self._purged = time.monotonic()

    async def run(self) -> None:
        """End reservations until cancelled; a database that is away is waited for."""
        trouble: str | None = None
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.end_due()
                trouble = None
            except RegistryUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("no reservation is ended: %s", trouble)
            except Exception:
                # Whatever somebody wrote into a row must not end the process, again and again.
                log.exception("ending reservations failed in an unforeseen way")

    async def end_due(self) -> Sequence[Reservation]:
        """Make one pass, and tell of those that it ended.

        Raises:
            RegistryUnavailable: The database is away.
        """
        ended = [*await self._ledger.expire(), *await self._ledger.revoke(self._offline_seconds)]
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
            await self._ledger.purge()
        return ended
