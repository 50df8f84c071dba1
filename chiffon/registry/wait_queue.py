"""Who waits for room, first come first served; the statements are in ``sql/wait_queue.sql``.

They are kept in a table and not in the memory of who took the request: whoever answers may die,
another one goes on, and nobody loses the position.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

from chiffon.contract.messages import CapacityWait
from chiffon.registry.pool import Pool

log = logging.getLogger(__name__)

ANSWERING_SECONDS = 5.0
"""For who answers to do so; then another one may."""

MOST_KINDS = 100
"""Different requests that one pass looks at, of those that came first."""

MOST_OF_ONE = 20
"""Who request the same that one pass looks at: those behind them would get nothing anyway."""

MOST_TRIES = 5
"""To send somebody the answer."""

OFFERED_SECONDS = 1.0
"""For who was offered room to reserve it, before others are offered it."""

KEPT_SECONDS = 5.0
"""For how long who was offered room may come back to the same position, if another was faster."""

MOST_WAITING = 10_000
"""In the queue; nobody else may join."""


@dataclass(frozen=True, slots=True)
class ReplyAddress:
    """Where an answer goes, and which request it belongs to."""

    exchange: str
    key: str
    correlation_id: str | None

    def __post_init__(self) -> None:
        if not isinstance(self.exchange, str) or not isinstance(self.key, str):
            raise TypeError("an exchange and a key are texts")


@dataclass(frozen=True, slots=True)
class Waiting:
    """One who waits.

    ``is_over``: the time is up. ``kind``: the same for all who request the same, in the order in
    which the first of each came, from 1.
    """

    wait_id: UUID
    request: CapacityWait
    reply: ReplyAddress
    is_over: bool
    kind: int


class WaitQueue:
    """The queue of those who wait. Safe to use from many tasks and processes at once.

    Raises what ``Registry`` does.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def join(self, wait_id: UUID, request: CapacityWait, reply: ReplyAddress) -> bool:
        """Go to the end of the queue; who is in it keeps the position and changes the rest.

        Returns:
            Whether there was room: ``MOST_WAITING`` may wait.
        """
        rows = await self._pool.fetch(
            "join",
            wait_id=wait_id,
            request=request.model_dump_json(),
            timeout_seconds=request.timeout_seconds,
            reply=json.dumps(asdict(reply)),
            most=MOST_WAITING,
        )
        return bool(rows)

    async def waiting(self) -> list[Waiting]:
        """Return who is to be looked at, in the order in which they came.

        What nobody can read, as others wrote it, is removed.
        """
        found, unreadable = [], []
        rows = await self._pool.fetch("waiting", most_kinds=MOST_KINDS, most_of_one=MOST_OF_ONE)
        for row in rows:
            try:
                request = CapacityWait.model_validate_json(row["request"])
                reply = ReplyAddress(**json.loads(row["reply"]))
            except (ValueError, TypeError):
                unreadable.append(row["wait_id"])
                continue
            found.append(Waiting(row["wait_id"], request, reply, row["is_over"], row["kind"]))
        if unreadable:
            log.warning("removed %d from the wait queue that cannot be read", len(unreadable))
            await self.leave(unreadable)
        return found

    async def offered_lately(self) -> set[UUID]:
        """Return the agents that somebody was offered just now."""
        rows = await self._pool.fetch("offered_lately", seconds=OFFERED_SECONDS)
        return {row["offered_agent_id"] for row in rows}

    async def begin_answering(self, wait_ids: Sequence[UUID]) -> dict[UUID, bool]:
        """Return those that are ours to answer now, and whether that is the last try."""
        rows = await self._pool.fetch(
            "begin_answering", wait_ids=wait_ids, seconds=ANSWERING_SECONDS
        )
        return {row["wait_id"]: row["tries"] >= MOST_TRIES for row in rows}

    async def note_offers(self, agents: Mapping[UUID, UUID]) -> None:
        """Note who was offered which agent first: they may come back to their positions."""
        await self._pool.fetch(
            "note_offers", wait_ids=list(agents), agent_ids=list(agents.values())
        )

    async def leave(self, wait_ids: Sequence[UUID]) -> None:
        """Remove these, and who was offered something a while ago."""
        await self._pool.fetch("leave", wait_ids=wait_ids, kept_seconds=KEPT_SECONDS)
