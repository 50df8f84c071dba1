"""The periodic pass that marks the silent offline.

Our own trouble must not look like the fleet's: while the canary does not arrive, nobody is judged,
and when one arrives after a gap, every agent has its own full lease to speak again. Any number of
orchestrators may each sweep: every transition is returned to exactly one of them.
"""

import logging
from dataclasses import dataclass

from chiffon.contract.lease import OUTAGE_FEWEST, OUTAGE_HOLD_SECONDS, OUTAGE_SHARE
from chiffon.orchestrator.events import Events
from chiffon.orchestrator.silence import judge
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Transition

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Swept:
    """What one pass changed: agents marked offline, pools whose outage began, or ended."""

    marked: list[Transition]
    began: list[str]
    ended: list[str]


class Sweeper:
    """Marks silent agents offline.

    Args:
        registry: Where the fleet is.
        events: Publishes what changed.
        outage_share: Of a pool; more than that silent at once is one outage.
        outage_hold_seconds: How long nobody of such a pool is marked.
    """

    def __init__(
        self,
        registry: Registry,
        events: Events,
        *,
        outage_share: float = OUTAGE_SHARE,
        outage_hold_seconds: float = OUTAGE_HOLD_SECONDS,
    ) -> None:
        self._registry = registry
        self._events = events
        self._outage_share = outage_share
        self._outage_hold_seconds = outage_hold_seconds

    async def sweep(self) -> Swept:
        """Make one pass, and publish what it changed: nothing almost always.

        Raises:
            RegistryUnavailable: The database is away; what was marked by then is published.
        """
        sweep = self._registry.sweep
        await self._registry.path.settle_grace()
        # In this order: whom another orchestrator marks between the two is in the second.
        silent, outages = await sweep.silent_pools(OUTAGE_FEWEST), await sweep.outages()
        if outages:
            await sweep.hide_silent()
        verdict = judge(
            silent,
            outages,
            share=self._outage_share,
            hold_seconds=self._outage_hold_seconds,
        )
        ended = await sweep.end_outages(verdict.end)
        for pool_name in ended:
            log.warning("pool %s speaks again: everybody in it has a lease of grace", pool_name)
        self._events.pools("recovered", ended)
        begun = await sweep.begin_outages(verdict.begin)
        for pool_name in begun:
            log.error(
                "most of pool %s became silent at once: its agents are not marked offline for %g s",
                pool_name,
                self._outage_hold_seconds,
            )
        self._events.pools("degraded", begun)
        marked = await sweep.mark_offline(verdict.mark)
        for one in marked:
            host = one.hostname or "host unknown"
            log.info("agent %s (%s) is offline: %s", one.agent_id, host, one.reason)
        self._events.transitions(marked)
        return Swept(marked, begun, ended)
