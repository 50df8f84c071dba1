"""Questions over AMQP and their replies: one connection, one reply queue, any number at once.

When the connection breaks, open questions are asked again on the next one, until their deadline.
"""

import asyncio
import itertools
import logging
import os
import time
from typing import Any, Self, TypeVar

from aiormq.abc import DeliveredMessage
from pydantic import BaseModel

from chiffon.amqp.connection import Channel, Connection
from chiffon.amqp.declare import ANSWER_SECONDS, await_exchange
from chiffon.amqp.publisher import Properties, publish
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.amqp.translation import translated
from chiffon.contract.codec import MAX_REPLY_BYTES, decode, encode
from chiffon.contract.messages import BODIES, ERROR, ErrorReply
from chiffon.contract.topology import CAPACITY_KEY, DEADLINE_HEADER, RPC
from chiffon.errors import (
    BadMessage,
    BusRefused,
    BusUnavailable,
    CapacityRefused,
    CapacityTimeout,
    NoResponders,
    NotTaken,
    Unroutable,
)

log = logging.getLogger(__name__)

REDIAL_CAP_SECONDS = 1.0

ASK_AGAIN_SECONDS = 0.5
"""After a queue did not take a question, and nobody has answered it from another queue."""

Answer = TypeVar("Answer", bound=BaseModel)

_TYPES = {model: kind for kind, model in BODIES.items()}


class RpcClient:
    """Asks for as long as the context is open; it connects in the background.

    Args:
        url: The broker; several hosts allowed.
        name: Of the connection.
    """

    def __init__(self, url: str, name: str) -> None:
        self._supervised = ReconnectingConnection(
            url,
            name=name,
            prepare=self._prepare,
            redial_cap_seconds=REDIAL_CAP_SECONDS,
            stop_if_refused=True,
        )
        self._channel: Channel
        self._reply_queue = ""
        self._waiting: dict[str, asyncio.Future[DeliveredMessage]] = {}
        self._ids = (f"{os.getpid()}.{number}" for number in itertools.count(1))

    async def __aenter__(self) -> Self:
        await self._supervised.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._supervised.__aexit__(*error)

    async def call(
        self, kind: str, question: BaseModel, answer: type[Answer], timeout: float
    ) -> Answer:
        """Ask one question.

        Args:
            kind: Its AMQP ``type``.
            question: Its body.
            answer: The body of the reply that is expected.
            timeout: Seconds from call to reply, above zero.

        Raises:
            NoResponders: Nobody is listening. Known at once, without waiting.
            CapacityTimeout: Nothing came back within ``timeout``.
            CapacityRefused: The responder declined; ``code`` says why.
            BusRefused: The broker does not let us in, or not ask.
            BusUnavailable: The broker could not be reached within ``timeout``.
        """
        return _read(await self._reply(kind, question, timeout), answer)

    async def _reply(self, kind: str, question: BaseModel, timeout: float) -> DeliveredMessage:
        deadline = time.monotonic() + timeout
        body = encode(question)
        asked = False
        try:
            async with asyncio.timeout(timeout):
                while True:
                    connection = await self._supervised.connection()
                    asked = True
                    try:
                        return await self._call_once(connection, kind, body, deadline)
                    except (NoResponders, BusRefused):
                        raise
                    except NotTaken as error:
                        log.debug("asking again: %s", error)
                    except BusUnavailable as error:
                        # Asking twice harms nobody: a question changes nothing, and a request
                        # about a reservation says which one.
                        connection.drop(str(error))
                        await asyncio.sleep(0)
        except TimeoutError:
            if not asked:
                raise self._unreachable(timeout) from None
            raise CapacityTimeout(f"no answer within {timeout:g} s") from None

    def _unreachable(self, timeout: float) -> Exception:
        if self._supervised.lacks_topology:
            return NoResponders(self._supervised.trouble)
        return BusUnavailable(f"{self._supervised.trouble} (gave up after {timeout:g} s)")

    async def _call_once(
        self, connection: Connection, kind: str, body: bytes, deadline: float
    ) -> DeliveredMessage:
        correlation_id = next(self._ids)
        left = max(deadline - time.monotonic(), 0.001)
        reply: asyncio.Future[DeliveredMessage] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = reply
        properties = Properties(
            message_type=kind,
            content_type="application/json",
            correlation_id=correlation_id,
            reply_to=self._reply_queue,
            expiration=str(max(int(left * 1_000), 1)),
            headers={DEADLINE_HEADER: int((time.time() + left) * 1_000)},
        )
        # Beside the wait for the reply, which need not wait for the confirm: of a question that is
        # routed to several queues the slowest of them decides when that comes.
        publishing = asyncio.create_task(
            publish(
                self._channel,
                body,
                exchange=RPC,
                routing_key=CAPACITY_KEY,
                properties=properties,
                timeout=left,
            )
        )
        publishing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            either: set[asyncio.Future[Any]] = {reply, connection.lost}
            await asyncio.wait({publishing, *either}, return_when=asyncio.FIRST_COMPLETED)
            if publishing.done() and not reply.done():
                is_elsewhere = isinstance(publishing.exception(), NotTaken)
                if not is_elsewhere:
                    publishing.result()
                await asyncio.wait(
                    either,
                    # The standby queue may hold it all the same.
                    timeout=ASK_AGAIN_SECONDS if is_elsewhere else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if reply.done():
                self._supervised.reset_back_off()
                return reply.result()
            if connection.lost.done():
                raise BusUnavailable(f"lost the broker: {connection.lost.result()}")
            publishing.result()
            raise AssertionError("neither a reply nor a reason why there is none")
        except Unroutable:
            raise NoResponders(
                "nobody answers capacity questions on this broker: is an orchestrator running?"
            ) from None
        finally:
            publishing.cancel()
            del self._waiting[correlation_id]

    async def _prepare(self, connection: Connection) -> None:
        await await_exchange(connection, RPC)
        channel = await connection.channel()
        channel.on_consumer_cancel_callbacks.add(
            lambda _: connection.drop("the broker cancelled the consumer of the reply queue")
        )
        with translated("making a reply queue"):
            queue = await channel.queue_declare(
                "", exclusive=True, auto_delete=True, timeout=ANSWER_SECONDS
            )
            self._reply_queue = str(queue.queue)
            await channel.basic_consume(
                self._reply_queue, self._on_reply, no_ack=True, timeout=ANSWER_SECONDS
            )
        self._channel = channel

    async def _on_reply(self, message: DeliveredMessage) -> None:
        waiting = self._waiting.get(str(message.header.properties.correlation_id))
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        else:
            log.debug("a reply came after its deadline, or twice")


def _read(reply: DeliveredMessage, answer: type[Answer]) -> Answer:
    """Return the answer of the expected kind, or raise the refusal that came instead."""
    answered, kind = reply.header.properties.message_type, _TYPES[answer]
    try:
        if answered == ERROR:
            refusal = decode(ErrorReply, reply.body, MAX_REPLY_BYTES)
            raise CapacityRefused.of(refusal.code, refusal.message, refusal.details)
        if answered != kind:
            raise BadMessage(f"type {str(answered)[:64]!r} is not {kind}")
        return decode(answer, reply.body, MAX_REPLY_BYTES)
    except BadMessage as error:
        raise CapacityRefused("internal", f"the answer does not fit: {error}") from None
