"""``/api/v1``: the fleet and its capacity, answered by the service that answers over AMQP."""

from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from chiffon.capacity.fleet import Agent, AgentPage, Fleet
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.fields import OnlyKnownFields
from chiffon.contract.messages import (
    MAX_OFFERS,
    AgentCapacity,
    AgentStatus,
    AgentType,
    CapacityOffers,
    CapacityQuery,
    Explanation,
    Offer,
)
from chiffon.gateway import examples
from chiffon.gateway.history import History, Reading
from chiffon.gateway.parameters import no_parameters, once
from chiffon.gateway.problems import documented

AgentId = Annotated[
    UUID,
    Path(description="The agent's id.", examples=["3f1c0a52-1c1b-4a0e-9d5c-2f7a5d1e8b90"]),
]
PoolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["default"])]


class _Parameters(OnlyKnownFields):
    # Values of a query are texts, so not strict.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class CapacityParameters(_Parameters):
    """The needs of ``capacity.find.v1``, as parameters of a URL."""

    min_gpu_vram_gb: float = Field(0.0, ge=0, le=2.0**40, description="Free VRAM, GiB.")
    min_single_gpu_vram_gb: float = Field(
        0.0, ge=0, le=2.0**40, description="Free VRAM on one GPU, GiB."
    )
    min_cpu_cores: int = Field(1, ge=1, le=1_000_000, description="Free whole cores.")
    min_memory_gb: float = Field(0.0, ge=0, le=2.0**40, description="Free memory, GiB.")
    agent_type: AgentType | Literal["any"] = Field("desktop", description="Only these, or `any`.")
    pool_name: PoolName | None = Field(None, description="Only this pool.")
    gpu_type: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")] | None = Field(
        None, description="Only agents with GPUs of this vendor.", examples=["nvidia"]
    )
    capabilities: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")]] = Field(
        default_factory=list, max_length=64, description="All of them; once for each."
    )
    limit: int = Field(100, ge=1, le=MAX_OFFERS)
    show_reserved: bool = Field(
        False, description="With what was reported, before what is reserved was taken off."
    )

    def query(self) -> CapacityQuery:
        """Return the question, in the words of the contract."""
        needs = self.model_dump()
        if self.agent_type == "any":
            needs["agent_type"] = None
        return CapacityQuery(**needs)


class ListParameters(_Parameters):
    """Which agents are listed, and how many at a time."""

    status: AgentStatus | None = Field(None, description="Only these.")
    pool_name: PoolName | None = Field(None, description="Only this pool.")
    agent_type: AgentType | None = Field(None, description="Only these.")
    limit: int = Field(100, ge=1, le=MAX_OFFERS)
    after: str | None = Field(
        None, max_length=1_024, description="`next` of the page before, for those that follow."
    )


class CapacityAnswer(BaseModel):
    """The offers, and why the other agents are none."""

    offers: CapacityOffers
    explanation: Explanation


class HistoryAnswer(BaseModel):
    """An agent's recent readings, oldest first, as this gateway has seen them since it started."""

    agent_id: UUID
    readings: list[Reading]


def router(service: OrchestratorService, history: History) -> APIRouter:
    """Return the routes of the API."""
    api = APIRouter(prefix="/api/v1")

    @api.get(
        "/agents/available-capacity",
        tags=["agents"],
        summary="The agents that can take a job now, best first",
        dependencies=[Depends(once)],
        responses={
            200: examples.shown([examples.OFFER], headers=_OF_OFFERS),
            **documented(400, 500, 503),
        },
    )
    async def available_capacity(
        parameters: Annotated[CapacityParameters, Query()], response: Response
    ) -> list[Offer]:
        """Most free VRAM first, then most free cores, then `performance_score`, then `agent_id`.

        Offline, busy, drained and silent agents are never among them. An empty list is a good
        answer: nothing fits now.
        """
        offers = await service.available(parameters.query())
        response.headers["Chiffon-Degraded"] = "true" if offers.degraded else "false"
        response.headers["Chiffon-As-Of"] = offers.as_of.isoformat()
        response.headers["Chiffon-Total-Matches"] = str(offers.total_matches)
        response.headers["Chiffon-Total-Relation"] = offers.total_relation
        return offers.agents

    @api.get(
        "/agents/{agent_id}/capacity",
        tags=["agents"],
        summary="What one agent last reported",
        dependencies=[Depends(no_parameters)],
        responses={
            200: examples.shown(examples.AGENT_CAPACITY),
            **documented(400, 404, 500, 503),
        },
    )
    async def agent_capacity(agent_id: AgentId) -> AgentCapacity:
        """`null` is unknown. An agent that never reported metrics answers with zeros."""
        return await service.show(agent_id)

    @api.get(
        "/agents",
        tags=["fleet"],
        summary="All agents, by pool and host, a page at a time",
        dependencies=[Depends(once)],
        responses={
            200: examples.shown({"agents": [examples.AGENT], "next": None}),
            **documented(400, 500, 503),
        },
    )
    async def agents(parameters: Annotated[ListParameters, Query()]) -> AgentPage:
        """Ask again with `after` = `next` until that is `null`."""
        return await service.agents(**parameters.model_dump())

    @api.get(
        "/agents/{agent_id}",
        tags=["fleet"],
        summary="All that is known of one agent",
        dependencies=[Depends(no_parameters)],
        responses={200: examples.shown(examples.AGENT), **documented(400, 404, 500, 503)},
    )
    async def agent(agent_id: AgentId) -> Agent:
        """With the last body of its heartbeats, each GPU included, under `resources`."""
        return await service.agent(agent_id)

    @api.get(
        "/agents/{agent_id}/history",
        tags=["fleet"],
        summary="An agent's recent readings",
        dependencies=[Depends(no_parameters)],
        responses=documented(400, 500, 503),
    )
    async def agent_history(agent_id: AgentId) -> HistoryAnswer:
        """Kept in this gateway's memory: none before it started, and another has its own."""
        return HistoryAnswer(agent_id=agent_id, readings=history.of(agent_id))

    @api.get(
        "/fleet",
        tags=["fleet"],
        summary="The fleet in numbers",
        dependencies=[Depends(no_parameters)],
        responses={200: examples.shown(examples.FLEET), **documented(400, 500, 503)},
    )
    async def fleet() -> Fleet:
        """Counts by status, and whether we trust our own view now."""
        return await service.fleet()

    @api.get(
        "/capacity",
        tags=["fleet"],
        summary="The offers, and why the other agents are none",
        dependencies=[Depends(once)],
        responses={200: examples.shown(examples.CAPACITY), **documented(400, 500, 503)},
    )
    async def capacity(
        parameters: Annotated[CapacityParameters, Query()],
    ) -> CapacityAnswer:
        """Looks at every agent: for people. Planners ask for `available-capacity`."""
        query = parameters.query()
        return CapacityAnswer(
            offers=await service.find(query), explanation=await service.explain(query)
        )

    return api


_OF_OFFERS: dict[str, Any] = {
    "Chiffon-Degraded": {
        "description": "`true`: we do not trust our own view now, agents may be missing.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "Chiffon-As-Of": {
        "description": "When the registry was asked, on its own clock.",
        "schema": {"type": "string", "format": "date-time"},
    },
    "Chiffon-Total-Matches": {
        "description": "How many agents match, counted up to `limit`.",
        "schema": {"type": "integer"},
    },
    "Chiffon-Total-Relation": {
        "description": "`eq`: that is all of them; `gte`: there are more.",
        "schema": {"type": "string", "enum": ["eq", "gte"]},
    },
}
