"""Answers those who wait for room, first come first served.

Everybody who waits stands in one line, in the registry. Each pass looks at the whole line with one
statement, however many wait: in the order in which they came, each gets the offers that nobody
before it was given in that pass. So room for two is offered to the first two, and who comes third
is asked again when they have had the time to take it. Who wants more than there is does not hold up
those behind.
"""

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any
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
from chiffon.messages import CAPACITY_OFFERS, MAX_OFFERS, CapacityOffers, CapacityQuery, Offer
from chiffon.messages import CapacityWait as Question
from chiffon.registry import Registry
from chiffon.registry.line import Line, Waiting

log = logging.getLogger(__name__)

PASS_SECONDS = 1.0
"""Between two passes: how long who was offered room has to take it before others are."""

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
        self._joined = asyncio.Event()

    async def join(self, wait_id: UUID, question: Question, reply: Mapping[str, Any]) -> None:
        """Let somebody wait; the answer is published by whoever makes the pass in which it fits.

        Args:
            wait_id: The same keeps its place.
            question: What is waited for, and how long.
            reply: ``exchange``, ``key`` and ``correlation_id`` of the answer.

        Raises:
            CapacityRefused: ``unavailable``: too many wait.
            RegistryUnavailable: The line is away.
        """
        if not await self._line.join(wait_id, question, reply):
            raise CapacityRefused("unavailable", "too many are waiting; try again")
        self._joined.set()

    async def run(self) -> None:
        """Make a pass every second, and when somebody joined here, until cancelled."""
        trouble: str | None = None
        while True:
            try:
                async with asyncio.timeout(PASS_SECONDS):
                    await self._joined.wait()
            except TimeoutError:
                pass
            self._joined.clear()
            try:
                await self.serve()
                trouble = None
            except RegistryUnavailable as error:
                if trouble != str(error):
                    trouble = str(error)
                    log.warning("those who wait are not answered: %s", trouble)

    async def serve(self) -> int:
        """Make one pass.

        Returns:
            How many were answered.

        Raises:
            RegistryUnavailable: The line is away; everybody keeps the place.
        """
        line = await self._line.waiting()
        if not line:
            return 0
        offers = await self._offers(line)
        ready = [one for one in line if offers[one.wait_id] or one.is_over]
        ours = await self._line.take([one.wait_id for one in ready])
        answered = [self._answer(one, offers[one.wait_id]) for one in ready if one.wait_id in ours]
        done = [wait_id for wait_id in await asyncio.gather(*answered) if wait_id is not None]
        if done:
            await self._line.leave(done)
        return len(done)

    async def _offers(self, line: Sequence[Waiting]) -> dict[UUID, list[Offer]]:
        """Return what each is offered: nobody what somebody earlier would take first."""
        questions: dict[str, CapacityQuery] = {}
        for one in line:
            questions.setdefault(_needs(one.question), one.question)
        numbers = {needs: number for number, needs in enumerate(questions)}
        # As many more as may be spoken for by those who come first.
        most = min(max(one.question.limit for one in line) + len(line), MAX_OFFERS)
        found = await self._line.find_each(list(questions.values()), most)
        spoken_for: set[UUID] = set()
        offers: dict[UUID, list[Offer]] = {}
        for one in line:
            rows = found[numbers[_needs(one.question)]]
            left = (row for row in rows if row["agent_id"] not in spoken_for)
            fitting = [offer for row in left if (offer := offer_of(row, one.question)) is not None]
            offers[one.wait_id] = fitting[: one.question.limit]
            if fitting:
                spoken_for.add(fitting[0].agent_id)
        return offers

    async def _answer(self, one: Waiting, offers: list[Offer]) -> UUID | None:
        """Send one answer; returns who has it or cannot be reached, ``None`` to try again."""
        began = time.monotonic()
        question = one.question
        found = await self._capacity.find(question.model_copy(update={"limit": 1}))
        answer = CapacityOffers(
            as_of=found.as_of,
            degraded=found.degraded,
            total_matches=len(offers),
            total_relation="gte" if len(offers) == question.limit else "eq",
            agents=offers,
            explanation=found.explanation,
        )
        try:
            await self._answers.publish(
                encode(answer),
                exchange=one.reply["exchange"],
                routing_key=one.reply["key"],
                properties=Properties(
                    message_type=CAPACITY_OFFERS,
                    content_type="application/json",
                    correlation_id=one.reply["correlation_id"],
                ),
                timeout=SEND_SECONDS,
            )
        except (Unroutable, NotTaken):
            log.info("%s waited and is gone", one.wait_id)
        except BusUnavailable as error:
            log.warning("not answered who waited, trying again: %s", error)
            return None
        log.debug("answered %s in %.3f s", one.wait_id, time.monotonic() - began)
        return one.wait_id


def _needs(question: Question) -> str:
    named = question.model_dump(mode="json", exclude={"timeout_seconds", "wait_id", "limit"})
    return json.dumps(named, sort_keys=True)
