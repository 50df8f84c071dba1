"""Answers capacity questions over AMQP.

A question names where its answer goes; only forms that cannot reach somebody's queue are taken.
Answers are sent without waiting for a confirm and without ``mandatory``, so a planner that has
gone costs nothing; but for reservations, which are released if nobody took the answer. Over direct
reply-to nobody can know that: there a reservation stands until its lease ends. The
question is acknowledged after its answer was sent: if this responder dies before, another one gets
it.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiormq.abc import DeliveredMessage
from prometheus_client import Counter, Histogram

from chiffon.amqp.connection import Channel, Connection
from chiffon.amqp.dead_letters import DeadLetters
from chiffon.amqp.declare import bind, declare_queue
from chiffon.amqp.properties import undecodable
from chiffon.amqp.publisher import Properties, Publisher, acknowledge
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.amqp.translation import translated
from chiffon.capacity.reservations import ReservationService
from chiffon.contract.codec import MAX_REPLY_BYTES, encode
from chiffon.contract.messages import ERROR, ErrorReply
from chiffon.contract.topology import (
    CAPACITY,
    CAPACITY_KEY,
    CAPACITY_QUEUE,
    CAPACITY_STANDBY_QUEUE,
    DEADLINE_HEADER,
    REPLY_FORMS,
    RPC,
    Binding,
    reply_route,
    tells_of_delivery,
)
from chiffon.errors import (
    BadMessage,
    BusUnavailable,
    CapacityRefused,
    NotTaken,
    QueueDown,
    RegistryUnavailable,
    Unroutable,
)
from chiffon.observability.metrics import SECONDS
from chiffon.orchestrator.requests import KINDS, Requests, refusal
from chiffon.registry.reservations import Made
from chiffon.registry.wait_queue import ReplyAddress

log = logging.getLogger(__name__)

QUESTIONS = Counter(
    "chiffon_questions",
    "Capacity questions by their type and what came of them: answered, waits, the code of a "
    "refusal, dead_lettered, dropped as their planner had stopped waiting, or unsent.",
    ["type", "outcome"],
)
ANSWERED_IN = Histogram(
    "chiffon_question_seconds",
    "From a question's arrival here to its answer being sent.",
    ["type"],
    buckets=SECONDS,
)

ANSWERED_AT_ONCE = 64
"""Requests in work at a time; the others wait in the queue, where other responders see them."""

LOOK_AGAIN_SECONDS = 5.0
"""Between two looks whether the node of the usual queue is back."""

SEND_SECONDS = 1.0
"""For one answer to be written: a connection that an alarm blocks must not hold us up."""


class Responder:
    """Answers what the queue ``chiffon.capacity`` holds.

    Args:
        requests: Who knows the answers.
        reservations: Who takes room back that was given and not taken.
        answers: A connection for answers and nothing else. Where an answer goes is the planner's
            word: the broker may refuse it and close the connection, which must not cost canary
            and dead letters theirs.
        confirmed: Publishes with confirms, so that it is known what nobody took.
        dead_letters: Where questions go that say nowhere to answer.
        reply_forms: Which forms of ``reply_to`` are written to.
    """

    def __init__(
        self,
        requests: Requests,
        reservations: ReservationService,
        answers: ReconnectingConnection,
        confirmed: Publisher,
        dead_letters: DeadLetters,
        *,
        reply_forms: Sequence[str] = REPLY_FORMS,
    ) -> None:
        self._requests = requests
        self._reservations = reservations
        self._reply_forms = tuple(reply_forms)
        self._answers = answers
        self._replies = Publisher(answers, confirms=False)
        self._confirmed = confirmed
        self._dead_letters = dead_letters
        self._queue = CAPACITY_QUEUE
        self._session: Connection | None = None
        self._channel: Channel | None = None
        self._consumer_tag: str | None = None
        self._working: set[asyncio.Task[None]] = set()

    async def attach(self, connection: Connection) -> None:
        """Declare the queue and start to answer on a new connection.

        Raises:
            QueueDown: The queue is on a node that is down. The next time it is the standby queue.
        """
        self._channel = None
        queue = self._queue
        channel = await connection.channel(confirms=False, prefetch=ANSWERED_AT_ONCE)
        channel.on_consumer_cancel_callbacks.add(
            lambda _: connection.drop(f"the broker cancelled the consumer of {queue.name}")
        )
        try:
            await declare_queue(channel, queue)
        except QueueDown:
            self._queue = CAPACITY_STANDBY_QUEUE
            raise
        await bind(channel, Binding(RPC, queue.name, CAPACITY_KEY))
        with translated(f"consuming {queue.name}"):
            answer = await channel.basic_consume(queue.name, self._on_delivery)
        self._consumer_tag = answer.consumer_tag
        self._session, self._channel = connection, channel
        log.info("answering %s", queue.name)

    @property
    def is_attached(self) -> bool:
        """Whether we believe that the broker gives us questions."""
        return self._channel is not None and not self._channel.is_closed

    async def bind(self) -> None:
        """Bind the queue again: an exchange that was deleted took the binding with it.

        Raises:
            BusUnavailable: The connection is gone.
        """
        if self._channel is not None and self.is_attached:
            await bind(self._channel, Binding(RPC, self._queue.name, CAPACITY_KEY))

    async def run(self, dial: Callable[[], Awaitable[Connection]]) -> None:
        """Return from the standby queue when the node of the usual one is back, until cancelled.

        Args:
            dial: Opens a connection to look with.
        """
        while True:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            if self._queue is CAPACITY_QUEUE or self._session is None:
                continue
            try:
                looking = await dial()
                try:
                    await declare_queue(await looking.channel(confirms=False), CAPACITY_QUEUE)
                finally:
                    await looking.close()
            except BusUnavailable as error:
                log.debug("still on %s: %s", self._queue.name, error)
                continue
            self._queue = CAPACITY_QUEUE
            self._session.drop(f"the node of {CAPACITY} is back")

    async def stop(self) -> None:
        """Take no more questions, and finish those that are in work."""
        if self._channel is not None and self._consumer_tag is not None:
            try:
                with translated("ending the consumer"):
                    await self._channel.basic_cancel(self._consumer_tag, timeout=SEND_SECONDS)
            except BusUnavailable as error:
                log.debug("%s", error)
        if self._working:
            await asyncio.wait(self._working, timeout=SEND_SECONDS)

    async def _on_delivery(self, message: DeliveredMessage) -> None:
        # A task of our own: the library cancels its callbacks when the channel closes.
        task = asyncio.create_task(self._serve(message, time.monotonic()))
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _serve(self, message: DeliveredMessage, received: float) -> None:
        try:
            await self._handle(message, received)
        except Exception:
            log.exception("a capacity question failed in an unforeseen way")
        try:
            await acknowledge(message)
        except BusUnavailable as error:
            log.debug("%s", error)

    async def _handle(self, message: DeliveredMessage, received: float) -> None:
        properties = message.header.properties
        problem = undecodable(message.header)
        if problem is not None:
            await self._dead_letter(message, problem)
            return
        try:
            exchange, key = reply_route(properties.reply_to, self._reply_forms)
        except ValueError as error:
            await self._dead_letter(message, str(error))
            return
        patience = _patience_seconds(message)
        asked = _type(message)
        if time.monotonic() - received > patience:
            QUESTIONS.labels(asked, "dropped").inc()
            return  # it waited here for too long: whoever asked has stopped waiting
        answer = await self._answer_to(message, exchange, key)
        if answer is None:
            QUESTIONS.labels(asked, "waits").inc()
            return
        if time.monotonic() - received > patience:
            QUESTIONS.labels(asked, "dropped").inc()
            log.info("dropped an answer: its planner stopped waiting after %g s", patience)
            await self._give_back(answer)
            return
        # Whether a reservation reached its holder must be known; of other answers it need not.
        must_be_known = answer.made is not None and tells_of_delivery(key)
        publisher = self._confirmed if must_be_known else self._replies
        try:
            await publisher.publish(
                answer.body,
                exchange=exchange,
                routing_key=key,
                properties=Properties(
                    message_type=answer.kind,
                    content_type="application/json",
                    correlation_id=properties.correlation_id,
                ),
                timeout=SEND_SECONDS,
                mandatory=must_be_known,
            )
            self._answers.reset_back_off()
            QUESTIONS.labels(asked, answer.outcome).inc()
            ANSWERED_IN.labels(asked).observe(time.monotonic() - received)
        except (Unroutable, NotTaken) as error:
            QUESTIONS.labels(asked, "unsent").inc()
            log.warning("nobody took an answer: %s", error)
            await self._give_back(answer)
        except BusUnavailable as error:
            # It may have arrived: a reservation stays until its lease ends.
            QUESTIONS.labels(asked, "unsent").inc()
            log.warning("dropped an answer: %s", error)

    async def _give_back(self, answer: "_Answer") -> None:
        if answer.made is None:
            return
        try:
            if await self._reservations.undelivered(answer.made):
                log.info("released %s: undelivered", answer.made.reservation.reservation_id)
        except RegistryUnavailable as error:
            log.warning("an undelivered reservation waits for its lease to end: %s", error)

    async def _dead_letter(self, message: DeliveredMessage, reason: str) -> None:
        QUESTIONS.labels(_type(message), "dead_lettered").inc()
        log.warning("dead-lettered a capacity question: %s", reason)
        try:
            await self._dead_letters.publish(message, reason)
        except BusUnavailable as error:
            log.warning("the dead letter was not confirmed: %s", error)

    async def _answer_to(
        self, message: DeliveredMessage, exchange: str, key: str
    ) -> "_Answer | None":
        """Return the answer; ``None`` if whoever asked waits for it now."""
        properties = message.header.properties
        origin = ReplyAddress(exchange, key, properties.correlation_id)
        try:
            _refuse_late(message)
            answered = await self._requests.answer(properties.message_type, message.body, origin)
        except Exception as error:
            answered = ERROR, refusal(error)
        if answered is None:
            return None
        kind, reply = answered
        made = reply if isinstance(reply, Made) else None
        said = reply.reservation if isinstance(reply, Made) else reply
        body = encode(said)
        if len(body) > MAX_REPLY_BYTES:
            kind, said = (
                ERROR,
                refusal(BadMessage("the answer is too large: ask for a lower limit")),
            )
            body = encode(said)
        outcome = said.code if isinstance(said, ErrorReply) else "answered"
        return _Answer(kind, outcome, body, made)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is sent back; ``made`` is the reservation in it, if it made one."""

    kind: str
    outcome: str
    body: bytes
    made: Made | None


def _type(message: DeliveredMessage) -> str:
    kind = message.header.properties.message_type
    return kind if kind in KINDS else "other"


def _patience_seconds(message: DeliveredMessage) -> float:
    """Return how long after its arrival here an answer is still wanted."""
    expiration = message.header.properties.expiration
    return int(expiration) / 1_000 if expiration and expiration.isdecimal() else math.inf


def _refuse_late(message: DeliveredMessage) -> None:
    """Refuse a question whose deadline has passed, naming both clocks: they may differ."""
    deadline = (message.header.properties.headers or {}).get(DEADLINE_HEADER)
    if deadline is None:
        return
    if isinstance(deadline, float) and deadline.is_integer():
        deadline = int(deadline)  # not every language has integers
    if isinstance(deadline, bool) or not isinstance(deadline, int):
        raise BadMessage(f"{DEADLINE_HEADER}: must be a whole number of unix milliseconds")
    now = int(time.time() * 1_000)
    if now > deadline:
        raise CapacityRefused(
            "expired",
            f"the deadline was {deadline} (unix ms) and the responder's clock says {now}",
        )
