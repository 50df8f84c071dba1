"""Setting a refused message aside, with its reason, where it can be looked at and replayed.

``basic.reject`` cannot carry a text, so what we refuse we publish ourselves to the dead letters
and acknowledge the original after the confirm.
"""

import time

from aiormq.abc import DeliveredMessage

from chiffon.bus import Properties, Publisher
from chiffon.encoding import Refusal
from chiffon.frames import Delivery
from chiffon.link import Link
from chiffon.topology import (
    DEAD_LETTER_HEADER,
    DEAD_LETTERS,
    ORIGIN_EXCHANGE_HEADER,
    ORIGIN_KEY_HEADER,
    REASON_HEADER,
    SET_ASIDE_HEADER,
)

CONFIRM_SECONDS = 2.0


class DeadLetters:
    """Puts messages among the dead letters.

    Args:
        outgoing: The connection to publish on.
    """

    def __init__(self, outgoing: Link) -> None:
        self._publisher = Publisher(outgoing)

    async def set_aside(self, message: DeliveredMessage | Delivery, refusal: Refusal) -> None:
        """Publish a refused message, or a refused part of one, and wait for the confirm.

        The headers say why, and which exchange and key it came by.

        Raises:
            BusUnavailable: Not confirmed within 2 s.
        """
        original = message.header.properties
        await self._publisher.publish(
            refusal.body,
            exchange=DEAD_LETTERS,
            routing_key=_short(message.routing_key) or "",
            properties=Properties(
                delivery_mode=2,
                message_type=_short(original.message_type),
                content_type=_short(original.content_type),
                headers={
                    DEAD_LETTER_HEADER: "1",
                    REASON_HEADER: refusal.reason,
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
