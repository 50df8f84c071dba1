"""Answers those who wait for room, first come first served.

Everybody who waits stands in one line, in the registry. Each pass looks at it with one statement,
however many wait: in the order in which they came, each gets the offers of which nobody else was
offered the best just now. So room for two is offered to the first two, and who comes third is
offered it when they have had a second to take it. Who wants more than there is does not hold up
those behind.
"""

import asyncio
import logging
from collections.abc import Sequence
from itertools import islice
from uuid import UUID

from chiffon.bus import Properties, Publisher
from chiffon.capacity import OrchestratorService, offer_of
from chiffon.encoding import encode
from chiffon.errors import (
    BusUnavailable,
    CapacityRefused,
    NotTaken,
    RegistryUnavailable,
    Unroutable,
)
from chiffon.messages import CAPACITY_OFFERS, MAX_OFFERS, CapacityOffers
from chiffon.messages import CapacityWait as Question
from chiffon.registry import Registry
from chiffon.registry.line import MOST_OF_ONE, MOST_QUESTIONS, Line, Reply, Waiting

log = logging.getLogger(__name__)

PASS_SECONDS = 1.0

SEND_SECONDS = 1.0


class WaitingRoom:
    """The line of one orchestrator; the others serve the same one.

    Args:
        registry: Where the line is, and the fleet.
        answers: Publishes with confirms, so that it is known who cannot be reached.
    """

    def __init__(self, registry: Registry, answers: Publisher) -> None:
        self._line = Line(registry)
        self._capacity = OrchestratorService(registry)
        self._answers = answers
        self._again = asyncio.Event()

    async def join(self, wait_id: UUID, question: Question, reply: Reply) -> None:
        """Let somebody wait; the answer is published by whoever makes the pass in which it fits.

        Args:
            wait_id: The same keeps its place.
            question: What is waited for, and how long.
            reply: Where the answer goes.

        Raises:
            CapacityRefused: ``unavailable``: too many wait.
            RegistryUnavailable: The line is away.
        """
        if not await self._line.join(wait_id, question, reply):
            raise CapacityRefused("unavailable", "too many are waiting; try again")
        self._again.set()

    async def run(self) -> None:
        """Make a pass every second, and when somebody joined here, until cancelled."""
        trouble: str | None = None
        while True:
            try:
                async with asyncio.timeout(PASS_SECONDS):
                    await self._again.wait()
            except TimeoutError:
                pass
            self._again.clear()
            try:
                await self.serve()
                trouble = None
            except RegistryUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("those who wait are not answered: %s", trouble)
            except Exception:
                # Whatever somebody wrote into a row must not end the process, again and again.
                log.exception("answering those who wait failed in an unforeseen way")

    async def serve(self) -> int:
        """Make one pass.

        Returns:
            How many were answered.

        Raises:
            RegistryUnavailable: The line is away; everybody keeps the place.
        """
        line = await self._line.waiting()
        if not line:
            await self._line.leave([])
            return 0
        answers = await self._offers(line)
        ready = [
            one
            for one in line
            if one.wait_id in answers and (answers[one.wait_id].agents or one.is_over)
        ]
        ours = await self._line.take([one.wait_id for one in ready])
        taken = [one for one in ready if one.wait_id in ours]
        outcomes = await asyncio.gather(*(self._answer(one, answers[one.wait_id]) for one in taken))
        offered, done = {}, []
        for one, is_sent in zip(taken, outcomes, strict=True):
            theirs = answers[one.wait_id].agents
            if is_sent and theirs:
                offered[one.wait_id] = theirs[0].agent_id
            elif is_sent is not None or one.is_over or ours[one.wait_id]:
                done.append(one.wait_id)
        await self._line.offered(offered)
        await self._line.leave(done)
        if False in outcomes:
            self._again.set()  # what was meant for them is for those behind them
        return sum(is_sent is True for is_sent in outcomes)

    async def _offers(self, line: Sequence[Waiting]) -> dict[UUID, CapacityOffers]:
        """Return what each is offered: nobody what somebody else would take first."""
        spoken_for = await self._line.spoken_for()
        # Whose time is up comes first, and is gone with this pass.
        urgent = sorted(line, key=lambda one: (not one.is_over, one.kind))
        kinds = list(dict.fromkeys(one.kind for one in urgent))[:MOST_QUESTIONS]
        questions = {one.kind: one.question for one in line if one.kind in kinds}
        # Some more than are asked for, as others may be offered them first.
        most = min(max(one.question.limit for one in line) + MOST_OF_ONE, MAX_OFFERS)
        found = dict(
            zip(questions, await self._line.find_each(list(questions.values()), most), strict=True)
        )
        answers: dict[UUID, CapacityOffers] = {}
        for one in line:
            if one.kind not in found:
                continue  # in a later pass
            theirs = found[one.kind]
            left = (row for row in theirs.rows if row["agent_id"] not in spoken_for)
            fitting = (offer for row in left if (offer := offer_of(row, one.question)) is not None)
            offers = list(islice(fitting, one.question.limit))
            answers[one.wait_id] = CapacityOffers(
                as_of=theirs.as_of,
                degraded=theirs.degraded,
                total_matches=len(offers),
                total_relation="gte" if len(offers) == one.question.limit else "eq",
                agents=offers,
            )
            if offers:
                spoken_for.add(offers[0].agent_id)
        return answers

    async def _answer(self, one: Waiting, answer: CapacityOffers) -> bool | None:
        """Send one answer; returns whether anybody took it, ``None`` if that is not known."""
        try:
            if one.question.explain and not answer.agents:
                explanation = await self._capacity.explain(one.question)
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
