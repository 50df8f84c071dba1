"""Two agents with one id."""

import logging
import time
from collections.abc import Iterable
from uuid import UUID

from chiffon.contract.lease import MISSED_HEARTBEATS
from chiffon.registry.rows import Stale

log = logging.getLogger(__name__)


class DuplicateAgents:
    """Agents of whose earlier start heartbeats keep coming: two processes use one id."""

    def __init__(self) -> None:
        self._seen: dict[UUID, int] = {}
        self._named: dict[UUID, float] = {}

    def warn(self, stale: Iterable[Stale]) -> None:
        """Name those of which it was not the first time, each at most once a minute."""
        now = time.monotonic()
        for one in stale:
            # The first few may be what was in the queue when the agent was started anew.
            self._seen[one.agent_id] = self._seen.get(one.agent_id, 0) + 1
            is_kept_up = self._seen[one.agent_id] >= MISSED_HEARTBEATS
            if not is_kept_up or now - self._named.get(one.agent_id, -60.0) < 60.0:
                continue
            self._named[one.agent_id] = now
            log.warning(
                "agent %s sends heartbeats of an earlier start (%d, the registry has %d): a "
                "cloned disk, or a clock set back; mend: `chiffon fleet forget %s`",
                one.agent_id,
                one.incarnation,
                one.kept_incarnation,
                one.agent_id,
            )
