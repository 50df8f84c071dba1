"""Looking at the dead letters, and putting them back once what was wrong is mended.

They have no id of their own: the id shown is a digest of what is in one, so that two that are the
same in every byte are the same dead letter. Looking takes them out of the queue and gives them
back, in the same order.
"""

import hashlib
import json
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiormq.abc import DeliveredMessage
from pamqp.common import FieldTable

from chiffon.amqp.connection import Channel, Connection
from chiffon.amqp.publisher import Properties, acknowledge, publish
from chiffon.amqp.translation import translated
from chiffon.contract.topology import (
    DEAD_LETTERS,
    HELD_HEADER,
    ORIGIN_EXCHANGE_HEADER,
    ORIGIN_KEY_HEADER,
    REASON_HEADER,
    SET_ASIDE_HEADER,
)

ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class DeadLetter:
    """A message that was set aside.

    Args:
        letter_id: Twelve hexadecimal digits, from what is in it.
        reason: Why; the broker's own word where nobody of ours set it aside.
        exchange: Where it was published.
        routing_key: And with which key.
        message_type: The AMQP ``type``, ``None`` if it had none.
        age_seconds: Since it was set aside; ``None`` if that is not known.
        body: As it came.
    """

    letter_id: str
    reason: str
    exchange: str
    routing_key: str
    message_type: str | None
    age_seconds: float | None
    body: bytes

    def data(self) -> dict[str, Any]:
        """Return it as JSON has it; a body that is no text is written with escapes."""
        return {
            "letter_id": self.letter_id,
            "reason": self.reason,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "message_type": self.message_type,
            "age_seconds": None if self.age_seconds is None else round(self.age_seconds, 1),
            "size_bytes": len(self.body),
            "body": self.body.decode(errors="backslashreplace"),
        }


class DeadLetterQueue:
    """The queue of dead letters, held while the context of ``opened`` is open.

    What is not replayed or purged is given back when it ends. Another who looks meanwhile finds
    none of those held here.
    """

    def __init__(self, channel: Channel, publishing: Channel) -> None:
        self._channel = channel
        self._publishing = publishing

    @classmethod
    @asynccontextmanager
    async def opened(cls, connection: Connection) -> AsyncIterator["DeadLetterQueue"]:
        """Hold the dead letters.

        Raises:
            BusUnavailable: The broker cannot be reached, or there is no such queue.
        """
        yield cls(await connection.channel(confirms=False), await connection.channel())
        # Closing the connection gives back what is not acknowledged.

    async def read(self, limit: int) -> list[tuple[DeadLetter, DeliveredMessage]]:
        """Return the oldest letters, ``limit`` at most, each with the message to answer for."""
        found: list[tuple[DeadLetter, DeliveredMessage]] = []
        while len(found) < limit:
            with translated("reading dead letters"):
                message = await self._channel.basic_get(DEAD_LETTERS, timeout=ANSWER_SECONDS)
            if message.delivery_tag is None or message.header is None:
                break
            found.append((_letter(message), message))
        return found

    async def replay(self, letter: DeadLetter, message: DeliveredMessage) -> None:
        """Publish a letter where it was published, and take it out once that is confirmed.

        It says how old it is, so that a heartbeat that outlived its lease raises nobody. Doing so
        twice does no harm: what is not newer changes nothing.

        Raises:
            Unroutable: No queue takes it any more.
            BusUnavailable: Not confirmed; the letter stays.
        """
        held: FieldTable = {}
        if letter.age_seconds is not None:
            held[HELD_HEADER] = int(letter.age_seconds * 1_000)
        original = message.header.properties
        await publish(
            self._publishing,
            letter.body,
            exchange=letter.exchange,
            routing_key=letter.routing_key,
            properties=Properties(
                message_type=original.message_type,
                content_type=original.content_type,
                delivery_mode=2,
                headers=held,
            ),
            timeout=ANSWER_SECONDS,
        )
        await acknowledge(message)

    async def purge(self, message: DeliveredMessage) -> None:
        """Take a letter out for good."""
        await acknowledge(message)


def chosen(
    letters: Collection[tuple[DeadLetter, DeliveredMessage]], ids: Collection[str]
) -> list[tuple[DeadLetter, DeliveredMessage]]:
    """Return those whose id begins with one of ``ids``; all of them if there are none."""
    return [
        (letter, message)
        for letter, message in letters
        if not ids or any(letter.letter_id.startswith(wanted) for wanted in ids)
    ]


def _letter(message: DeliveredMessage) -> DeadLetter:
    properties = message.header.properties
    headers: dict[str, Any] = dict(properties.headers or {})
    death = headers.get("x-death")
    first: dict[str, Any] = death[0] if isinstance(death, list) and death else {}
    keys = first.get("routing-keys") or [message.routing_key]
    exchange = str(headers.get(ORIGIN_EXCHANGE_HEADER) or first.get("exchange") or "")
    key = str(headers.get(ORIGIN_KEY_HEADER) or keys[0] or "")
    by_broker = f"the broker set it aside: {headers.get('x-first-death-reason', 'unknown')}"
    content = [exchange, key, properties.message_type, headers.get(SET_ASIDE_HEADER)]
    digest = hashlib.sha256(json.dumps(content, default=str).encode() + message.body)
    return DeadLetter(
        letter_id=digest.hexdigest()[:12],
        reason=str(headers.get(REASON_HEADER) or by_broker),
        exchange=exchange,
        routing_key=key,
        message_type=properties.message_type,
        age_seconds=_age(headers.get(SET_ASIDE_HEADER), first.get("time")),
        body=message.body,
    )


def _age(set_aside_ms: Any, death_time: Any) -> float | None:
    if isinstance(set_aside_ms, int):
        return max(time.time() - set_aside_ms / 1_000, 0.0)
    if hasattr(death_time, "timestamp"):
        return max(time.time() - float(death_time.timestamp()), 0.0)
    return None
