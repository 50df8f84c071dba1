"""Publishing a refused message to the dead letters, with its reason: there it can be replayed.

``basic.reject`` cannot carry a text, so what we refuse we publish ourselves to the dead letters
and acknowledge the original after the confirm.
"""

import logging
import time
from collections.abc import Awaitable, Callable

from aiormq.abc import DeliveredMessage

from chiffon.amqp.frames import Delivery
from chiffon.amqp.publisher import Properties, Publisher
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract.topology import (
    DEAD_LETTER_HEADER,
    DEAD_LETTERS,
    ORIGIN_EXCHANGE_HEADER,
    ORIGIN_KEY_HEADER,
    REASON_HEADER,
    SET_ASIDE_HEADER,
)
from chiffon.errors import TopologyMissing, Unroutable

log = logging.getLogger(__name__)

CONFIRM_SECONDS = 2.0


class DeadLetters:
    """Puts messages among the dead letters.

    Args:
        supervised: The connection to publish on.
        make_again: Puts exchange and queue on the broker, where somebody deleted them.
    """

    def __init__(
        self,
        supervised: ReconnectingConnection,
        make_again: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._publisher = Publisher(supervised)
        self._make_again = make_again

    async def publish(self, message: DeliveredMessage | Delivery, reason: str) -> None:
        """Publish a refused message, and wait for the confirm.

        The headers say why, and which exchange and key it came by.

        Raises:
            BusUnavailable: Not confirmed within 2 s.
        """
        try:
            await self._publish(message, reason)
        except (Unroutable, TopologyMissing) as error:
            if self._make_again is None:
                raise
            log.warning("making the dead letters again: %s", error)
            await self._make_again()
            await self._publish(message, reason)

    async def _publish(self, message: DeliveredMessage | Delivery, reason: str) -> None:
        original = message.header.properties
        await self._publisher.publish(
            message.body,
            exchange=DEAD_LETTERS,
            routing_key=_short(message.routing_key) or "",
            properties=Properties(
                delivery_mode=2,
                message_type=_short(original.message_type),
                content_type=_short(original.content_type),
                headers={
                    DEAD_LETTER_HEADER: "1",
                    REASON_HEADER: reason,
                    ORIGIN_EXCHANGE_HEADER: message.exchange or "",
                    ORIGIN_KEY_HEADER: message.routing_key or "",
                    SET_ASIDE_HEADER: int(time.time() * 1_000),
                },
            ),
            timeout=CONFIRM_SECONDS,
        )


def _short(text: str | None) -> str | None:
    """Return at most as much as a property may hold: 255 bytes.

    What was no UTF-8 stands here with a mark for each byte, and each mark is three.
    """
    return None if text is None else text.encode()[:255].decode(errors="ignore")
