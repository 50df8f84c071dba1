"""Reservations: room on agents that one planner holds, for a time."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from chiffon.contract.capacity import CapacityQuery, Limit, Needs
from chiffon.contract.fields import (
    MAX_GB,
    MAX_INTEGER,
    AgentType,
    Capabilities,
    Count,
    Gigabytes,
    Message,
    Name,
    Request,
    Time,
    Uuid,
    Vendor,
    Whole,
    WholeNumber,
    Word,
)

ReservationState = Literal["held", "released", "expired", "revoked"]

Fence = Annotated[int, Field(ge=1, le=MAX_INTEGER), WholeNumber()]
LeaseSeconds = Annotated[float, Field(ge=1, le=86_400)]
_Agents = Annotated[int, Field(ge=1, le=100), WholeNumber()]
_Gpus = Annotated[int, Field(ge=1, le=64), WholeNumber()]


class Alternative(Request):
    """What to take instead if the room before it is not there.

    A field that is ``null`` or left out is as in the request.
    """

    min_gpu_vram_gb: Gigabytes | None = None
    min_single_gpu_vram_gb: Gigabytes | None = None
    min_cpu_cores: Count | None = None
    min_memory_gb: Gigabytes | None = None
    agent_type: AgentType | None = None
    pool_name: Word | None = None
    gpu_type: Vendor | None = None
    capabilities: Capabilities | None = None
    agent_id: Uuid | None = None
    gpu_vram_gb: Gigabytes | None = None
    cpu_cores: Count | None = None
    memory_gb: Gigabytes | None = None
    gpus: _Gpus | None = None
    count: _Agents | None = None
    distinct_hosts: bool | None = None


class CapacityReserve(Needs):
    """The request ``capacity.reserve.v1``: take this room for me.

    On each of ``count`` agents, or on none: ``gpu_vram_gb`` on each of ``gpus`` GPUs (with 0, no
    GPU is taken), ``cpu_cores`` and ``memory_gb``. The needs of ``find`` must be met as well.
    ``distinct_hosts``: no two of the agents on one host. ``alternatives`` are tried in turn.

    The same ``holder`` and ``idempotency_key`` give the same reservation, however often it is
    asked for. ``agent_id``: there and nowhere else.
    """

    holder: Annotated[Name, Field(min_length=1, description="Who holds it, for people.")]
    idempotency_key: Uuid
    lease_seconds: LeaseSeconds = 60.0
    gpu_vram_gb: Gigabytes = 0.0
    cpu_cores: Count = 0
    memory_gb: Gigabytes = 0.0
    gpus: _Gpus = 1
    agent_id: Uuid | None = None
    count: _Agents = 1
    distinct_hosts: bool = False
    alternatives: Annotated[list[Alternative], Field(max_length=8)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _takes_something(self) -> "CapacityReserve":
        for one in self.choices():
            if not (one.gpu_vram_gb or one.cpu_cores or one.memory_gb):
                raise ValueError("gpu_vram_gb, cpu_cores and memory_gb are all 0: nothing to take")
            if one.gpus * one.gpu_vram_gb > MAX_GB:
                raise ValueError("gpus: so many with so much VRAM are more than can be asked for")
            if one.agent_id is not None and one.count > 1:
                raise ValueError("count: only 1 where agent_id names the agent")
        return self

    def needs(self) -> CapacityQuery:
        """Return the question that finds who may have the room: one of many, if GPUs are many."""
        vram = self.gpu_vram_gb
        return CapacityQuery(
            min_gpu_vram_gb=max(self.min_gpu_vram_gb, self.gpus * vram),
            min_single_gpu_vram_gb=max(self.min_single_gpu_vram_gb, vram),
            min_cpu_cores=max(self.min_cpu_cores, self.cpu_cores),
            min_memory_gb=max(self.min_memory_gb, self.memory_gb),
            agent_type=self.agent_type,
            pool_name=self.pool_name,
            gpu_type=self.gpu_type,
            capabilities=self.capabilities,
        )

    def choices(self) -> "list[CapacityReserve]":
        """Return what may be taken, in the order in which it is wanted, without alternatives."""
        first = self.model_copy(update={"alternatives": []})
        return [
            first,
            *(
                first.model_copy(update=one.model_dump(exclude_none=True))
                for one in self.alternatives
            ),
        ]


class ReservationRenew(Request):
    """The request ``capacity.renew.v1``: my lease begins anew, now.

    ``lease_seconds: null`` keeps the lease that it has. ``fence``, if given, must be its own.
    """

    reservation_id: Uuid
    fence: Fence | None = None
    lease_seconds: LeaseSeconds | None = None


class ReservationRelease(Request):
    """The request ``capacity.release.v1``: I need it no longer.

    Releasing again what one has released is answered as the first time.
    """

    reservation_id: Uuid
    fence: Fence | None = None


class ReservationShow(Request):
    """The question ``capacity.reservation.show.v1``."""

    reservation_id: Uuid


class ReservationList(Request):
    """The question ``capacity.reservation.list.v1``: newest first. ``null`` means any."""

    state: ReservationState | None = "held"
    holder: Name | None = None
    agent_id: Uuid | None = None
    limit: Limit = 100


class ReservedGpu(Message):
    """A part of one GPU. Of an agent that lists no GPUs it is the one with index 0."""

    uuid: str | None
    index: Annotated[int, Field(ge=0), WholeNumber()]
    vram_gb: Annotated[float, Field(ge=0)]


class Place(Message):
    """What is reserved on one agent."""

    agent_id: Uuid
    hostname: str | None
    pool_name: str
    gpus: list[ReservedGpu]


class Reservation(Message):
    """The answer ``capacity.reservation.v1``: room that is, or was, reserved.

    Agent, host and GPUs are those of the first of ``places``, which has one for each agent.
    ``cpu_cores`` and ``memory_gb`` are reserved on each of them. ``alternative`` says which was
    reserved: 0 is the request itself, 1 its first alternative.

    It counts until ``expires_at``; its holder should take it as over somewhat earlier, counted
    from when it sent its last request. ``fence`` is larger than that of any reservation made
    before it: whoever starts jobs can refuse the holder of a smaller one, once it has seen a larger
    one for the same GPU.
    """

    reservation_id: Uuid
    holder: str
    idempotency_key: Uuid | None
    state: ReservationState
    reason: str | None = Field(description="Why it is over, null while it is held.")
    fence: Whole
    lease_seconds: float
    created_at: Time
    expires_at: Time
    ended_at: Time | None
    as_of: Time
    agent_id: Uuid
    hostname: str | None
    gpus: list[ReservedGpu]
    gpu_vram_gb: float
    cpu_cores: Whole
    memory_gb: float
    places: list[Place]
    alternative: Whole = 0


class Reservations(Message):
    """The answer ``capacity.reservations.v1``, newest first."""

    as_of: Time
    reservations: list[Reservation]
