"""What can be taken: the rules, and the one service that applies them to the registry.

``Capacity`` is the interface. ``OrchestratorService`` answers from the registry,
``planner.PlannerClient`` asks one over AMQP: the same questions, answers and errors.
"""

import asyncio
import json
import logging
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from operator import attrgetter
from typing import Any, Protocol
from uuid import UUID

from pydantic import ValidationError

from chiffon.capacity.explanation import Misfits, explain
from chiffon.capacity.fleet import Agent, AgentPage, Fleet
from chiffon.capacity.room import Wanted, available, fits
from chiffon.contract.codec import first_problem
from chiffon.contract.messages import (
    MAX_INTEGER,
    MAX_OFFERS,
    SCALAR_METRICS,
    AgentCapacity,
    CapacityOffers,
    CapacityQuery,
    CapacityReserve,
    Explanation,
    Offer,
    Reported,
)
from chiffon.errors import AgentNotFoundError, BadMessage
from chiffon.registry.registry import Registry
from chiffon.registry.rows import AgentRow, Available, Candidate, Found

log = logging.getLogger(__name__)


class Capacity(Protocol):
    """The capacity questions, wherever they are answered."""

    async def find(self, query: CapacityQuery) -> CapacityOffers:
        """Return the agents that can take ``query`` now, best first; none is a good answer."""
        ...

    async def show(self, agent_id: UUID) -> AgentCapacity:
        """Return what one agent last reported.

        Raises:
            AgentNotFoundError: It is not in the registry.
        """
        ...


class OrchestratorService:
    """Answers capacity questions from the registry.

    Args:
        registry: Where the fleet is; all methods raise ``RegistryUnavailable`` when it is away.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def find(self, query: CapacityQuery) -> CapacityOffers:
        """Return the agents that can take ``query`` now, best first.

        Offline, busy, drained and silent agents are never offered, nor those whose metrics are
        absent or malformed (a warning names them).

        Args:
            query: The needs; cores are whole cores, sizes GiB.

        Returns:
            At most ``query.limit`` offers. Matches are counted up to the limit, with
            ``query.explain`` up to 1,000; ``total_relation`` is ``gte`` beyond that.
        """
        most = MAX_OFFERS if query.explain else query.limit
        found = await self.candidates(Wanted.of(query), most + 1)
        for agent_id in found.malformed:
            log.warning("agent %s is not offered: its metrics are malformed", agent_id)
        offers = [offer for one in found.candidates if (offer := offer_of(one, query)) is not None]
        return CapacityOffers(
            as_of=found.as_of,
            degraded=found.degraded,
            total_matches=min(len(offers), most),
            total_relation="gte" if len(offers) > most else "eq",
            agents=offers[: query.limit],
            explanation=await self.explain(query) if query.explain else None,
        )

    async def candidates(self, wanted: Wanted, most: int) -> Found:
        """Return the agents that fit, best first.

        Args:
            wanted: What they must have.
            most: How many at most.
        """
        if wanted.agent_id is not None:
            one = await self._registry.offers.candidate(wanted.agent_id)
            found = await self._registry.offers.find(wanted.needs, 0)
            return replace(found, candidates=[one] if one is not None and fits(one, wanted) else [])
        read = await self._registry.offers.find(wanted.needs, most)
        fitting, skipped = [one for one in read.candidates if fits(one, wanted)], most
        last = read
        # What an index cannot tell, such as places on several GPUs, may refuse some of them.
        while len(fitting) < most and len(last.candidates) == most:
            last = await self._registry.offers.find(wanted.needs, most, skipped)
            fitting += [one for one in last.candidates if fits(one, wanted)]
            skipped += most
        return replace(read, candidates=fitting[:most])

    async def show(self, agent_id: UUID) -> AgentCapacity:
        """Return what one agent last reported.

        Raises:
            AgentNotFoundError: It is not in the registry.
        """
        return describe(await self._row(agent_id))

    async def explain(self, query: CapacityQuery) -> Explanation:
        """Return why each agent that ``find`` does not offer is not offered.

        Looks at every agent, where ``find`` stops at its limit: for people, not for planners.
        """
        return await self._explain(query)

    async def explain_refusal(self, request: CapacityReserve) -> Explanation:
        """Return why ``request`` could not be met: the needs of its first choice."""
        return await self._explain(request)

    async def _explain(self, request: CapacityQuery | CapacityReserve) -> Explanation:
        wanted = Wanted.of(request)
        found = Misfits(wanted)
        # Closed at the end, whatever happens: it keeps a connection.
        async with aclosing(self._registry.offers.examine(with_metrics=wanted.reserves)) as parts:
            async for rows in parts:
                found.add(rows)
                await asyncio.sleep(0)  # who asks a question meanwhile must not wait for all
        return explain(request, found)

    async def fleet(self) -> Fleet:
        """Return the fleet in numbers."""
        return Fleet.of(await self._registry.agents.summary())

    async def agent(self, agent_id: UUID) -> Agent:
        """Return all that is known of one agent.

        Raises:
            AgentNotFoundError: It is not in the registry.
        """
        return Agent.of(await self._row(agent_id))

    async def agents(
        self,
        *,
        status: str | None = None,
        pool_name: str | None = None,
        agent_type: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> AgentPage:
        """Return agents by pool and host, ``limit`` at a time.

        Args:
            status: Only these.
            pool_name: Only those in it.
            agent_type: Only these.
            after: ``next`` of the page before.
            limit: At most, at least 1.

        Raises:
            BadMessage: ``after`` is not from a page.
        """
        rows = await self._registry.agents.list(
            status,
            pool_name,
            agent_type,
            after=None if after is None else _position(after),
            most=limit + 1,
        )
        agents = [Agent.of(row) for row in rows[:limit]]
        return AgentPage(agents=agents, next=_cursor(agents[-1]) if len(rows) > limit else None)

    async def get_agent_capacity(self, agent_id: UUID | str) -> dict[str, Any]:
        """Return ``show`` as a dict: ``agent_id``, ``status``, the metrics, ``timestamp``, ages.

        Raises:
            ValueError: ``agent_id`` is a text that is not a UUID.
            AgentNotFoundError: It is not in the registry.
        """
        answer = await self.show(UUID(str(agent_id)))
        log.debug("Capacity of agent %s: %s", agent_id, answer)
        return answer.model_dump(mode="json")

    async def get_available_capacity(
        self, min_gpu_vram_gb: float = 0.0, min_cpu_cores: int = 1, **filters: Any
    ) -> list[dict[str, Any]]:
        """Return the offers of ``find`` as a list of dicts, best first.

        Args:
            min_gpu_vram_gb: Free VRAM in GiB, at least 0.
            min_cpu_cores: Free whole cores, at least 0.
            **filters: Other fields of ``CapacityQuery``.

        Raises:
            pydantic.ValidationError: A value is out of range; it is a ``ValueError``.
        """
        query = CapacityQuery(
            min_gpu_vram_gb=min_gpu_vram_gb, min_cpu_cores=min_cpu_cores, **filters
        )
        offers = await self.available(query)
        return [offer.model_dump(mode="json") for offer in offers.agents]

    async def available(self, query: CapacityQuery) -> CapacityOffers:
        """Return what ``find`` does, and log how many there were."""
        offers = await self.find(query)
        log.info(
            "Found %d agents with capacity (min_gpu=%sGB, min_cpu=%d)",
            len(offers.agents),
            query.min_gpu_vram_gb,
            query.min_cpu_cores,
        )
        return offers

    async def _row(self, agent_id: UUID) -> AgentRow:
        row = await self._registry.agents.show(agent_id)
        if row is None:
            raise AgentNotFoundError(agent_id)
        return row


def _cursor(last: Agent) -> str:
    position = json.dumps([last.pool_name, last.hostname or "", str(last.agent_id)])
    return urlsafe_b64encode(position.encode()).decode()


def _position(cursor: str) -> tuple[str, str, UUID]:
    try:
        pool_name, hostname, agent_id = json.loads(urlsafe_b64decode(cursor.encode()))
        position = (str(pool_name), str(hostname), UUID(agent_id))
        # What JSON can hold and a text of PostgreSQL cannot: half a character, and NUL.
        if b"\0" in "".join(position[:2]).encode():
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise BadMessage("after: not the `next` of a page") from None
    return position


def describe(row: AgentRow) -> AgentCapacity:
    """Return one agent's capacity as the contract has it.

    An agent that never reported metrics has zeros. A value that is not of the contract's type is
    unknown (``None``), never a number made up.
    """
    if row.resource_metrics == {}:
        metrics: dict[str, Any] = {**dict.fromkeys(SCALAR_METRICS, 0), "gpu_type": "none"}
    else:
        metrics = _scalars(row.resource_metrics)
    return AgentCapacity(
        agent_id=row.agent_id,
        status=row.status,
        timestamp=row.last_heartbeat_at,
        heartbeat_age_seconds=row.age_seconds,
        gpu_sample_age_seconds=_sample_age(row.resource_metrics),
        **metrics,
    )


def offer_of(candidate: Candidate, query: CapacityQuery) -> Offer | None:
    """Return a candidate as an offer; ``None``, and a warning, if it cannot be one."""
    written = candidate.metrics
    metrics = _scalars(written, _OFFERED)
    reported = {name: metrics[name] for name in _REPORTED}
    fields = {
        **dict(zip(_OF_CANDIDATE, _of_candidate(candidate), strict=True)),
        **metrics,
        "gpu_sample_age_seconds": _sample_age(written),
        "heartbeat_age_seconds": max(candidate.age_seconds or 0.0, 0.0),
    }
    if candidate.reserved_text is not None:
        fields.update(_left(reported, available(candidate)))
    if query.show_reserved:
        fields["reported"] = reported
    try:
        return Offer.model_validate(fields)
    except ValidationError as error:
        log.warning("agent %s is not offered: %s", candidate.agent_id, first_problem(error))
        return None


_REPORTED = tuple(Reported.model_fields)
_OFFERED = tuple(name for name in SCALAR_METRICS if name in Offer.model_fields)
_OF_CANDIDATE = (
    "agent_id",
    "agent_type",
    "pool_name",
    "hostname",
    "status",
    "performance_score",
    "last_heartbeat_at",
)
_of_candidate = attrgetter(*_OF_CANDIDATE)


def _left(reported: dict[str, Any], left: Available) -> dict[str, Any]:
    """Return what can be taken of what was reported; what is unknown stays so."""
    amounts = {
        "gpu_vram_available_gb": left.vram_gb,
        "gpu_vram_max_available_gb": left.single_gpu_vram_gb,
        "cpu_cores_available": int(left.cores),
        "memory_available_gb": left.memory_gb,
    }
    return {
        name: None if value is None else min(value, amounts[name])
        for name, value in reported.items()
    }


def _scalars(metrics: Any, names: Sequence[str] = SCALAR_METRICS) -> dict[str, Any]:
    """Return scalar metrics of a row that anyone may have written.

    A key that is not there counts as no free VRAM and one free core, and is otherwise unknown.
    A row with one GPU or none has its free VRAM on one GPU.
    """
    written = metrics if isinstance(metrics, dict) else {}
    scalars = {name: _READERS[name](written.get(name)) for name in names}
    if "gpu_vram_available_gb" not in written:
        scalars["gpu_vram_available_gb"] = 0.0
    if "cpu_cores_available" not in written:
        scalars["cpu_cores_available"] = 1
    if "gpu_vram_max_available_gb" not in written:
        gpus = written.get("gpus")
        is_one = not isinstance(gpus, list) or len(gpus) < 2
        all_of_it = scalars["gpu_vram_available_gb"]
        scalars["gpu_vram_max_available_gb"] = all_of_it if is_one else 0.0
    return scalars


def _sample_age(metrics: Any) -> float | None:
    age = _number(metrics.get("gpu_sample_age_seconds")) if isinstance(metrics, dict) else None
    return None if age is None else max(age, 0.0)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    # PostgreSQL keeps numbers that no float can hold. A truth value is no number.
    is_sound = type(value) in (int, float) and -MAX_INTEGER <= value <= MAX_INTEGER
    return float(value) if is_sound else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(SCALAR_METRICS, _number),
    "cpu_cores_physical": _whole,
    "cpu_cores_available": _whole,
    "gpu_type": _text,
}
