"""The periodic pass that marks the silent offline, and the canary that proves the path.

Our own trouble must not look like the fleet's. A canary goes the way of the heartbeats, from the
exchange to the commit; while none arrives, nobody is judged, and when one arrives after a gap,
every agent has its own full lease to speak again. The rule itself is one SQL statement.
"""

import asyncio
import json
import logging
import time
from collections.abc import Sequence

from chiffon import liveness
from chiffon.bus import Properties, Publisher
from chiffon.closings import Closings
from chiffon.errors import BusUnavailable, RegistryUnavailable
from chiffon.events import Events
from chiffon.link import Link
from chiffon.messages import CANARY
from chiffon.registry import Registry, Swept
from chiffon.topology import HEARTBEATS

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 2.0


class Sweeper:
    """Marks silent agents offline, every ``interval_seconds``.

    Any number of orchestrators may each run one: every transition is seen by exactly one.

    Args:
        registry: Where the fleet is.
        events: Who is told what changed.
        closings: Agents whose connection closed.
        interval_seconds: Between two passes.
        outage_share: Of a pool; more than that silent at once is one outage.
        outage_hold_seconds: How long the transitions of such a pool are held.
    """

    def __init__(
        self,
        registry: Registry,
        events: Events,
        closings: Closings,
        *,
        interval_seconds: float = 1.0,
        outage_share: float = liveness.OUTAGE_SHARE,
        outage_hold_seconds: float = liveness.OUTAGE_HOLD_SECONDS,
    ) -> None:
        self._registry = registry
        self._events = events
        self._closings = closings
        self._interval = interval_seconds
        self._outage_share = outage_share
        self._outage_hold_seconds = outage_hold_seconds

    async def run(self) -> None:
        """Sweep until cancelled; a database that is away is waited for."""
        trouble: str | None = None
        while True:
            await self._wait()
            try:
                await self.sweep()
                trouble = None
            except RegistryUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("no sweep: %s", trouble)

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(self._interval):
                await self._closings.due.wait()
        except TimeoutError:
            return
        self._closings.due.clear()

    async def sweep(self) -> Swept:
        """Make one pass, and tell of what it changed.

        Raises:
            RegistryUnavailable: The database is away; nobody was marked.
        """
        swept = await self._registry.mark_silent(
            self._closings.current(),
            share=self._outage_share,
            hold_seconds=self._outage_hold_seconds,
        )
        for one in swept.transitions:
            log.info(
                "agent %s (%s) is offline: %s",
                one.agent_id,
                one.hostname or "host unknown",
                one.reason,
            )
        for pool_name in swept.frozen:
            log.error(
                "most of pool %s fell silent at once: its agents are not marked offline for %g s",
                pool_name,
                self._outage_hold_seconds,
            )
        for pool_name in swept.thawed:
            log.warning("pool %s speaks again: everybody in it has a lease of grace", pool_name)
        self._events.transitions(swept.transitions)
        self._events.pools("degraded", swept.frozen)
        self._events.pools("recovered", swept.thawed)
        return swept


class Canary:
    """Publishes the canaries of one orchestrator every 2 s.

    Args:
        outgoing: The connection to publish on.
        keys: Their routing keys; see ``canary_keys``.
    """

    def __init__(self, outgoing: Link, keys: Sequence[str]) -> None:
        self._outgoing = outgoing
        self._publisher = Publisher(outgoing)
        self._keys = keys

    async def run(self) -> None:
        """Publish until cancelled; trouble with the broker only shows as an old canary."""
        trouble: str | None = None
        while True:
            try:
                await self.publish()
                trouble = None
            except BusUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("no canary: %s", trouble)
            await asyncio.sleep(liveness.CANARY_INTERVAL_SECONDS)

    async def publish(self) -> None:
        """Publish one canary by each key, and wait for the confirms.

        Raises:
            BusUnavailable: One was not confirmed within 2 s.
        """
        outcomes = await asyncio.gather(*map(self._publish, self._keys), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        self._outgoing.works()

    async def _publish(self, key: str) -> None:
        await self._publisher.publish(
            # The time is for whoever published it: of nobody else's clock it says anything.
            json.dumps({"published": time.monotonic()}).encode(),
            exchange=HEARTBEATS,
            routing_key=key,
            properties=Properties(
                message_type=CANARY,
                content_type="application/json",
                # One that waited longer proves nothing about the present.
                expiration=str(int(liveness.CANARY_FRESH_SECONDS * 1_000)),
            ),
            timeout=CONFIRM_SECONDS,
        )
