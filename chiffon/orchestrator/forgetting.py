"""Removes agents that are gone for good: containers and notebooks leave a row behind each time.

Any number of orchestrators may do so at once.
"""

import logging

from chiffon.registry.agents import Agents

log = logging.getLogger(__name__)

LOOK_SECONDS = 60.0


class Forgetting:
    """Forgets agents.

    Args:
        agents: Where they are.
        offline_seconds: Who is offline for so long is gone; 0: nobody is.
    """

    def __init__(self, agents: Agents, offline_seconds: float) -> None:
        self._agents = agents
        self._offline_seconds = offline_seconds

    async def forget(self) -> None:
        """Forget those who are gone, some at a time.

        Kept are agents that are drained, on which something is reserved, and those that became
        silent without a farewell and that an operator has ever named: somebody looks for them.

        Raises:
            RegistryUnavailable: The database is away.
        """
        if not self._offline_seconds:
            return
        while forgotten := await self._agents.forget_long_offline(
            self._offline_seconds, unnamed_only=True
        ):
            for one in forgotten:
                log.info("forgot agent %s (%s): long offline", one.agent_id, one.hostname or "?")
