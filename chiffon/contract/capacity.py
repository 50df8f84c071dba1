"""The capacity questions and their answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from chiffon.contract.explanation import Explanation
from chiffon.contract.fields import (
    AgentType,
    Capabilities,
    Count,
    ErrorCode,
    Gigabytes,
    Message,
    Request,
    Time,
    Uuid,
    Vendor,
    Whole,
    WholeNumber,
    Word,
    absent_if_empty,
)

MAX_OFFERS = 1_000

Limit = Annotated[int, Field(ge=1, le=MAX_OFFERS), WholeNumber()]


class CapacityShow(Request):
    """The question ``capacity.show.v1``: what has this one agent?"""

    agent_id: Uuid


class Needs(Request):
    """What an agent must have to be offered.

    Sizes are GiB, cores whole cores. ``agent_type: null`` means any type, and so for the other
    filters; ``capabilities`` must all be there. An agent whose value is unknown has 0 of it. What
    is reserved is not free.
    """

    min_gpu_vram_gb: Gigabytes = 0.0
    min_single_gpu_vram_gb: Annotated[
        Gigabytes, Field(description="GiB available on one GPU: many small ones do not add up.")
    ] = 0.0
    min_cpu_cores: Count = 1
    min_memory_gb: Gigabytes = 0.0
    agent_type: AgentType | None = "desktop"
    pool_name: Word | None = None
    gpu_type: Vendor | None = None
    capabilities: Capabilities = Field(default_factory=list)


class CapacityQuery(Needs):
    """The question ``capacity.find.v1``: which agents can take this now?

    ``explain``: say as well what became of every other agent, and what would have to be asked for
    instead. ``show_reserved``: give with each offer what its agent reported, before what is
    reserved was taken off.
    """

    limit: Limit = 100
    explain: bool = False
    show_reserved: bool = False


class CapacityWait(CapacityQuery):
    """The question ``capacity.wait.v1``: answered when something fits, or when time is up.

    Who came first is answered first; ``limit`` is how many offers one answer may hold.

    ``timeout_seconds``: how long to wait; then the answer has no offers. ``wait_id`` keeps the
    position in the wait queue for who asks again, on another connection say; without it each
    question is a new one.
    """

    limit: Limit = 1
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    wait_id: Uuid | None = None


class Reported(Message):
    """What an agent reported as free, before what is reserved is taken off."""

    gpu_vram_available_gb: float | None
    gpu_vram_max_available_gb: float | None
    cpu_cores_available: Whole | None
    memory_available_gb: float | None


class Offer(Message):
    """An agent that can take what was asked for, as of its last heartbeat.

    The available values are what can be taken: what is reserved is taken off. ``reported`` has
    them as the agent reported them, if that was asked for.
    ``gpu_sample_age_seconds`` is how old the GPU readings were when that heartbeat was sent.
    """

    agent_id: Uuid
    agent_type: str
    pool_name: str
    hostname: str | None
    status: str
    gpu_type: str | None
    gpu_vram_available_gb: float | None
    gpu_vram_max_available_gb: float | None = None
    gpu_vram_total_gb: float | None
    gpu_sample_age_seconds: float | None = None
    cpu_cores_available: Whole | None
    cpu_load_1min: float | None
    memory_available_gb: float | None
    performance_score: float
    last_heartbeat_at: Time
    heartbeat_age_seconds: Annotated[float, Field(ge=0)]
    reported: Reported | None = Field(None, exclude_if=absent_if_empty)


class CapacityOffers(Message):
    """The answer ``capacity.offers.v1``, best first.

    Most free VRAM first, then most free cores, then ``performance_score``, then ``agent_id``.
    ``total_matches`` is exact where ``total_relation`` is ``eq``, a lower bound where ``gte``.
    ``degraded``: we do not trust our own view now, agents may be missing from it.
    ``explanation``: of what is not offered, if that was asked for.
    """

    as_of: Time
    degraded: bool
    total_matches: Annotated[int, Field(ge=0), WholeNumber()]
    total_relation: Literal["eq", "gte"]
    agents: list[Offer]
    explanation: Explanation | None = Field(None, exclude_if=absent_if_empty)


class AgentCapacity(Message):
    """The answer ``capacity.agent.v1``: one agent's last reported resources.

    An agent that has never reported metrics has zeros and ``gpu_type: "none"``. ``timestamp`` is
    when its last heartbeat was received, ``null`` before the first.
    """

    agent_id: Uuid
    status: str
    cpu_percent: float | None
    cpu_cores_physical: Whole | None
    cpu_cores_available: Whole | None
    cpu_load_1min: float | None
    cpu_load_5min: float | None
    memory_percent: float | None
    memory_available_gb: float | None
    gpu_vram_total_gb: float | None
    gpu_vram_available_gb: float | None
    gpu_vram_max_available_gb: float | None = None
    gpu_type: str | None
    gpu_sample_age_seconds: float | None = None
    timestamp: Time | None
    heartbeat_age_seconds: Annotated[float, Field(ge=0)] | None


class ErrorReply(Message):
    """The answer ``error.v1``: a code for programs, a sentence for people."""

    code: ErrorCode
    message: str
    details: dict[str, Any] = Field(default_factory=dict)
