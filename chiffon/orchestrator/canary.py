"""Canaries: messages that go the way of the heartbeats, to prove that the way is open."""

import asyncio
import json
import time
from collections.abc import Sequence

from chiffon.amqp.publisher import Properties, Publisher
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.lease import CANARY_FRESH_SECONDS
from chiffon.contract.messages import CANARY
from chiffon.contract.topology import HEARTBEATS

CONFIRM_SECONDS = 2.0


class Canary:
    """Publishes the canaries of one orchestrator.

    Args:
        supervised: The connection to publish on. One of its own: a queue that is down confirms
            none, which ends its connection each time.
        keys: Their routing keys; see ``canary_keys``.
    """

    def __init__(self, supervised: ReconnectingConnection, keys: Sequence[str]) -> None:
        self._supervised = supervised
        self._publisher = Publisher(supervised)
        self._keys = keys

    async def publish(self) -> None:
        """Publish one canary by each key, and wait for the confirms.

        Raises:
            BusUnavailable: One was not confirmed within 2 s.
        """
        outcomes = await asyncio.gather(*map(self._publish, self._keys), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        self._supervised.reset_back_off()

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
                expiration=str(int(CANARY_FRESH_SECONDS * 1_000)),
            ),
            timeout=CONFIRM_SECONDS,
        )
