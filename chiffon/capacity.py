"""What can be taken: the rules, and the one service that applies them to the registry.

``Capacity`` is the interface. ``OrchestratorService`` answers from the registry,
``planner.PlannerClient`` asks one over AMQP: the same questions, answers and errors.
"""

import json
import logging
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from uuid import UUID

import asyncpg
from pydantic import ValidationError
from pydantic_core import from_json

from chiffon.encoding import first_problem
from chiffon.errors import AgentNotFoundError, BadMessage
from chiffon.explanation import MOST_NAMED, explain
from chiffon.fleet import Agent, AgentPage, Fleet
from chiffon.messages import (
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
from chiffon.registry import AgentRow, Registry, document

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
        found = await self._registry.find(query, most + 1)
        for agent_id in found.malformed:
            log.warning("agent %s is not offered: its metrics are malformed", agent_id)
        offers = [offer for row in found.rows if (offer := offer_of(row, query)) is not None]
        return CapacityOffers(
            as_of=found.as_of,
            degraded=found.degraded,
            total_matches=min(len(offers), most),
            total_relation="gte" if len(offers) > most else "eq",
            agents=offers[: query.limit],
            explanation=await self.explain(query) if query.explain else None,
        )

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
        return explain(query, await self._registry.explain(query, MOST_NAMED))

    async def explain_refusal(self, request: CapacityReserve) -> Explanation:
        """Return why ``request`` could not be met: the needs of its first choice."""
        return explain(request, await self._registry.explain(request.needs(), MOST_NAMED, request))

    async def fleet(self) -> Fleet:
        """Return the fleet in numbers."""
        return Fleet.of(await self._registry.summary())

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
        rows = await self._registry.list_agents(
            status,
            pool_name,
            agent_type,
            after=None if after is None else _place(after),
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
        row = await self._registry.show(agent_id)
        if row is None:
            raise AgentNotFoundError(agent_id)
        return row


def _cursor(last: Agent) -> str:
    place = json.dumps([last.pool_name, last.hostname or "", str(last.agent_id)])
    return urlsafe_b64encode(place.encode()).decode()


def _place(cursor: str) -> tuple[str, str, UUID]:
    try:
        pool_name, hostname, agent_id = json.loads(urlsafe_b64decode(cursor.encode()))
        place = (str(pool_name), str(hostname), UUID(agent_id))
        # What JSON can hold and a text of PostgreSQL cannot: half a character, and NUL.
        if b"\0" in "".join(place[:2]).encode():
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise BadMessage("after: not the `next` of a page") from None
    return place


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


def offer_of(row: asyncpg.Record, query: CapacityQuery) -> Offer | None:
    """Return a row of the registry as an offer; ``None``, and a warning, if it cannot be one."""
    written = _written(row["resource_metrics"])
    metrics = _scalars(written, _OFFERED)
    reported = {name: metrics[name] for name in _REPORTED}
    fields = {
        **{name: row[name] for name in _OF_ROW},
        **metrics,
        "gpu_sample_age_seconds": _sample_age(written),
        "heartbeat_age_seconds": max(row["age_seconds"], 0.0),
        **_left(reported, row["room"]),
    }
    if query.show_reserved:
        fields["reported"] = reported
    try:
        return Offer.model_validate(fields)
    except ValidationError as error:
        log.warning("agent %s is not offered: %s", row["agent_id"], first_problem(error))
        return None


def _written(text: str) -> Any:
    try:
        return from_json(text)  # a sixth of the time
    except ValueError:
        return document(text)


_REPORTED = tuple(Reported.model_fields)
_OFFERED = tuple(name for name in SCALAR_METRICS if name in Offer.model_fields)
_OF_ROW = (
    "agent_id",
    "agent_type",
    "pool_name",
    "hostname",
    "status",
    "performance_score",
    "last_heartbeat_at",
)


def _left(reported: dict[str, Any], room: Sequence[float] | None) -> dict[str, Any]:
    """Return what can be taken of what was reported; what is unknown stays so."""
    if room is None:
        return reported
    vram, single, cores, memory = room
    left = {
        "gpu_vram_available_gb": vram,
        "gpu_vram_max_available_gb": single,
        "cpu_cores_available": int(cores),
        "memory_available_gb": memory,
    }
    return {
        name: None if value is None else min(value, left[name]) for name, value in reported.items()
    }


def _scalars(metrics: Any, names: Sequence[str] = SCALAR_METRICS) -> dict[str, Any]:
    """Return scalar metrics of a row that anyone may have written.

    A key that is not there counts as no free VRAM and one free core, and is otherwise unknown.
    A row with one GPU or none has its free VRAM on one GPU.
    """
    written = metrics if isinstance(metrics, dict) else {}
    gpus = written.get("gpus")
    is_one = not isinstance(gpus, list) or len(gpus) < 2
    missing = {
        "gpu_vram_available_gb": 0.0,
        "cpu_cores_available": 1,
        "gpu_vram_max_available_gb": written.get("gpu_vram_available_gb", 0.0) if is_one else 0.0,
    }
    return {name: _READERS[name](written.get(name, missing.get(name))) for name in names}


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
