"""Answers those who wait for room, first come first served.

The wait queue is in the registry, and all orchestrators serve the same one. Each pass goes through
it in the order in which they came: each gets the offers of which nobody else was offered the best
just now. So room for two is offered to the first two, and who comes third is offered it when they
have had a second to reserve it. Who wants more than there is does not hold up those behind.
"""

import asyncio
import logging
from collections.abc import Sequence
from itertools import islice
from uuid import UUID

from chiffon.amqp.publisher import Properties, Publisher
from chiffon.capacity.room import Wanted
from chiffon.capacity.service import OrchestratorService, offer_of
from chiffon.contract.codec import encode
from chiffon.contract.messages import CAPACITY_OFFERS, MAX_OFFERS, CapacityOffers, CapacityWait
from chiffon.contract.topology import tells_of_delivery
from chiffon.errors import (
    BusUnavailable,
    CapacityRefused,
    NotTaken,
    RegistryUnavailable,
    Unroutable,
)
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Found
from chiffon.registry.wait_queue import MOST_KINDS, MOST_OF_ONE, ReplyAddress, Waiting

log = logging.getLogger(__name__)

PASS_SECONDS = 1.0
"""Between two passes, if nobody joins here."""

SEND_SECONDS = 1.0


class WaitQueueServer:
    """Serves the wait queue; the other orchestrators serve the same one.

    Args:
        registry: Where the queue is.
        capacity: Who has room.
        answers: Publishes with confirms, so that it is known who cannot be reached. On a connection
            of its own: where an answer goes is the word of who asked.
    """

    def __init__(
        self, registry: Registry, capacity: OrchestratorService, answers: Publisher
    ) -> None:
        self._queue = registry.wait_queue
        self._capacity = capacity
        self._answers = answers
        self.joined = asyncio.Event()
        """Set when somebody joined here, or is to be looked at again at once."""

    async def join(self, wait_id: UUID, request: CapacityWait, reply: ReplyAddress) -> None:
        """Let somebody wait; the answer is published by whoever makes the pass in which it fits.

        Args:
            wait_id: The same keeps its position.
            request: What is waited for, and how long.
            reply: Where the answer goes.

        Raises:
            CapacityRefused: ``unavailable``: too many wait.
            RegistryUnavailable: The queue is away.
        """
        if not await self._queue.join(wait_id, request, reply):
            raise CapacityRefused("unavailable", "too many are waiting; try again")
        self.joined.set()

    async def serve(self) -> int:
        """Make one pass.

        Returns:
            How many were answered.

        Raises:
            RegistryUnavailable: The queue is away; everybody keeps the position.
        """
        waiting = await self._queue.waiting()
        if not waiting:
            await self._queue.leave([])
            return 0
        answers = await self._offers(waiting)
        ready = [
            one
            for one in waiting
            if one.wait_id in answers and (answers[one.wait_id].agents or one.is_over)
        ]
        ours = await self._queue.begin_answering([one.wait_id for one in ready])
        answering = [one for one in ready if one.wait_id in ours]
        outcomes = await asyncio.gather(
            *(self._answer(one, answers[one.wait_id]) for one in answering)
        )
        offered, done = {}, []
        for one, is_sent in zip(answering, outcomes, strict=True):
            offers = answers[one.wait_id].agents
            if is_sent and offers:
                offered[one.wait_id] = offers[0].agent_id
            elif is_sent is not None or one.is_over or ours[one.wait_id]:
                done.append(one.wait_id)
        await self._queue.note_offers(offered)
        await self._queue.leave(done)
        if False in outcomes:
            self.joined.set()  # what was meant for them is for those behind them
        return sum(is_sent is True for is_sent in outcomes)

    async def _offers(self, waiting: Sequence[Waiting]) -> dict[UUID, CapacityOffers]:
        """Return what each is offered: nobody what somebody else would reserve first."""
        spoken_for = await self._queue.offered_lately()
        # Whose time is up comes first, and is gone with this pass.
        urgent = sorted(waiting, key=lambda one: (not one.is_over, one.kind))
        kinds = list(dict.fromkeys(one.kind for one in urgent))[:MOST_KINDS]
        # Some more than are asked for, as others may be offered them first.
        most = min(max(one.request.limit for one in waiting) + MOST_OF_ONE, MAX_OFFERS)
        found: dict[int, Found] = {}
        answers: dict[UUID, CapacityOffers] = {}
        for one in waiting:
            if one.kind not in kinds:
                continue  # in a later pass
            if one.kind not in found:
                wanted = Wanted.of(one.request)
                found[one.kind] = await self._capacity.candidates(wanted, most)
            theirs = found[one.kind]
            left = (each for each in theirs.candidates if each.agent_id not in spoken_for)
            fitting = (offer for each in left if (offer := offer_of(each, one.request)) is not None)
            offers = list(islice(fitting, one.request.limit))
            answers[one.wait_id] = CapacityOffers(
                as_of=theirs.as_of,
                degraded=theirs.degraded,
                total_matches=len(offers),
                total_relation="gte" if len(offers) == one.request.limit else "eq",
                agents=offers,
            )
            if offers:
                spoken_for.add(offers[0].agent_id)
        return answers

    async def _answer(self, one: Waiting, answer: CapacityOffers) -> bool | None:
        """Send one answer; returns whether anybody took it, ``None`` if that is not known."""
        try:
            if one.request.explain and not answer.agents:
                explanation = await self._capacity.explain(one.request)
                answer = answer.model_copy(update={"explanation": explanation})
            await self._answers.publish(
                encode(answer),
                exchange=one.reply.exchange,
                routing_key=one.reply.key,
                properties=Properties(
                    message_type=CAPACITY_OFFERS,
                    content_type="application/json",
                    correlation_id=one.reply.correlation_id,
                ),
                timeout=SEND_SECONDS,
                mandatory=tells_of_delivery(one.reply.key),
            )
        except (Unroutable, NotTaken):
            log.info("%s waited and is gone", one.wait_id)
            return False
        except (BusUnavailable, RegistryUnavailable) as error:
            log.warning("not answered who waited, trying again: %s", error)
            return None
        except Exception:
            log.exception("answering %s failed in an unforeseen way", one.wait_id)
            return None
        return True
