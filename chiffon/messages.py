"""The wire contract, version 1: what may be said, and how it is written down.

Bodies are JSON in UTF-8; the AMQP property ``type`` names the message. Unknown fields are
ignored, so that fields can be added; everything else that does not fit is refused with one line
that names the field. ``_gb`` means GiB (2^30 bytes). ``null`` means unknown and is never written
as 0; 0 means a known zero.

Senders that are not chiffon build these bodies by hand from the JSON Schema that
``chiffon schema jsonschema`` prints; nothing here depends on Python on the other side.
"""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

STATUS_UPDATE = "status_update.v1"
CANARY = "canary.v1"
CAPACITY_SHOW = "capacity.show.v1"
CAPACITY_FIND = "capacity.find.v1"
CAPACITY_AGENT = "capacity.agent.v1"
CAPACITY_OFFERS = "capacity.offers.v1"
ERROR = "error.v1"
AGENT_EVENT = "agent_event.v1"
FLEET_EVENT = "fleet_event.v1"

MAX_OFFERS = 1_000

MAX_INTEGER = 2**53 - 1
"""The largest whole number that every JSON reader keeps exact."""

_MAX_GB = 2.0**40
_MAX_COUNT = 1_000_000

AgentType = Literal["orchestrator", "infra", "desktop", "code", "research"]
AgentStatus = Literal["online", "busy", "offline"]
ErrorCode = Literal[
    "invalid_request", "unsupported_type", "agent_not_found", "unavailable", "expired", "internal"
]


def _only_text(value: Any) -> Any:
    """Refuse what lax parsing would take for a UUID or a time, such as a bare number."""
    if isinstance(value, str | UUID | datetime):
        return value
    raise ValueError("must be a string")


def _within_an_era(value: datetime) -> datetime:
    """Refuse times so far off that converting them to UTC or storing them would overflow."""
    if 1970 <= value.year <= 9000:
        return value
    raise ValueError("must be between the years 1970 and 9000")


# Strict everywhere but for the two types that JSON can only write as strings.
_Uuid = Annotated[UUID, BeforeValidator(_only_text), Field(strict=False)]
_Time = Annotated[
    AwareDatetime,
    BeforeValidator(_only_text),
    AfterValidator(_within_an_era),
    Field(strict=False),
]
# A word is one word of a routing key.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# Text for people may hold anything that is printed as itself: no C0, C1 or DEL, no line or
# direction marks that make one thing look like another, and no NUL, which jsonb cannot hold.
_PRINTED = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]*$"
_Name = Annotated[str, Field(pattern=_PRINTED, max_length=255)]
_Line = Annotated[str, Field(pattern=_PRINTED, max_length=512)]
_Percent = Annotated[float, Field(ge=0, le=100)]
_Gigabytes = Annotated[float, Field(ge=0, le=_MAX_GB)]
_Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
_Seconds = Annotated[float, Field(ge=0, le=1e9)]
_Load = Annotated[float, Field(ge=0, le=_MAX_COUNT)]
_Vendor = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]
_Capabilities = Annotated[
    list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")]], Field(max_length=64)
]


class _Message(BaseModel):
    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


# --- The heartbeat ----------------------------------------------------------------------------


class Gpu(_Message):
    """One GPU, or one MIG instance of it, as its driver describes it; ``null`` if it does not say.

    ``is_unified``: it has no memory of its own. Its VRAM is the host's memory, so the same GiB
    stand in ``memory_available_gb`` as well.
    """

    uuid: _Name | None = None
    index: _Count
    name: _Name | None = None
    vram_total_gb: _Gigabytes | None = None
    vram_available_gb: _Gigabytes | None = None
    utilization_percent: _Percent | None = None
    is_unified: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Gpu":
        _at_most(self, "vram_available_gb", "vram_total_gb")
        return self


class Reserved(_Message):
    """What the operator keeps for the host's owner; it is not in the available values."""

    cpu_cores: Annotated[float, Field(ge=0, le=_MAX_COUNT)] = 0.0
    memory_gb: _Gigabytes = 0.0
    gpu_vram_gb: Annotated[_Gigabytes, Field(description="GiB of each GPU.")] = 0.0


class ResourceMetrics(_Message):
    """What the probes read on one host. The scalar fields are the contract.

    A scalar that is left out is unknown, the same as ``null``, but for
    ``gpu_vram_max_available_gb``, which then follows from ``gpus``; an agent without ``gpus``
    counts as one device with the scalar VRAM. ``gpu_type: "none"`` says that the host has no
    GPU, so all VRAM fields are a known 0. With GPUs of several vendors the scalars speak for the
    one with most dedicated VRAM.
    """

    cpu_percent: _Percent | None = Field(None, description="Busy share of all CPUs, 0 to 100.")
    cpu_cores_physical: _Count | None = None
    cpu_cores_available: _Count | None = Field(
        None, description="Whole cores free for a new job: floor(usable CPUs - busy CPUs)."
    )
    cpu_load_1min: _Load | None = None
    cpu_load_5min: _Load | None = None
    memory_percent: _Percent | None = None
    memory_available_gb: _Gigabytes | None = Field(None, description="GiB (2^30 bytes).")
    gpu_vram_total_gb: _Gigabytes | None = Field(None, description="GiB over all GPUs.")
    gpu_vram_available_gb: _Gigabytes | None = Field(None, description="GiB over all GPUs.")
    gpu_vram_max_available_gb: _Gigabytes | None = Field(
        None, description="GiB, the most that is available on one GPU."
    )
    gpu_type: _Vendor | None = Field(None, description='"none" where the host has no GPU.')
    gpus: Annotated[list[Gpu], Field(max_length=64)] = Field(default_factory=list)
    probe_errors: Annotated[list[_Line], Field(max_length=64)] = Field(
        default_factory=list, description="Why a value is unknown, one line each."
    )
    gpu_sample_age_seconds: _Seconds | None = Field(
        None, description="How old the GPU readings were when this was sent."
    )
    overridden: Annotated[list[_Word], Field(max_length=64)] = Field(
        default_factory=list, description="Fields that the operator set, not the probes."
    )
    reserved: Reserved | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("gpu_type") == "none":
            known = {key: 0.0 for key in _VRAM if data.get(key) is None}
            return {**data, **known}
        if "gpu_vram_max_available_gb" not in data:
            return {**data, "gpu_vram_max_available_gb": _most_on_one_gpu(data)}
        return data

    @model_validator(mode="after")
    def _fits(self) -> "ResourceMetrics":
        _at_most(self, "gpu_vram_available_gb", "gpu_vram_total_gb")
        _at_most(self, "gpu_vram_max_available_gb", "gpu_vram_available_gb")
        _at_most(self, "gpu_vram_max_available_gb", "gpu_vram_total_gb")
        if self.gpu_type == "none" and any(getattr(self, key) for key in _VRAM):
            raise ValueError('gpu_type is "none" but there is VRAM')
        if len({gpu.index for gpu in self.gpus}) != len(self.gpus):
            raise ValueError("gpus: two have the same index")
        return self


_VRAM = ("gpu_vram_total_gb", "gpu_vram_available_gb", "gpu_vram_max_available_gb")

SCALAR_METRICS: tuple[str, ...] = (
    "cpu_percent",
    "cpu_cores_physical",
    "cpu_cores_available",
    "cpu_load_1min",
    "cpu_load_5min",
    "memory_percent",
    "memory_available_gb",
    *_VRAM,
    "gpu_type",
)
"""The metric fields that every answer repeats, in the order in which they are shown."""


class StatusUpdate(_Message):
    """One heartbeat: who speaks, in which order, until when it promises to speak again.

    (``incarnation``, ``sequence``) orders an agent's heartbeats: the first is its start time in
    unix milliseconds and grows with every start, the second counts from 1 within it. ``sent_at``
    is the sender's clock: shown, never compared with ours. ``status: "offline"`` is a farewell.
    """

    agent_id: _Uuid
    agent_type: AgentType = "desktop"
    pool_name: _Word = "default"
    capabilities: _Capabilities = Field(default_factory=list)
    status: AgentStatus = "online"
    hostname: _Name | None = None
    agent_version: _Name | None = None
    incarnation: Annotated[int, Field(ge=0, le=MAX_INTEGER)]
    sequence: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    sent_at: _Time
    interval_seconds: Annotated[float, Field(ge=0.5, le=600)] = 5.0
    resources: ResourceMetrics | None = None

    @property
    def order(self) -> tuple[int, int]:
        """What decides which of an agent's heartbeats is the newest."""
        return (self.incarnation, self.sequence)

    @property
    def is_farewell(self) -> bool:
        """Whether the agent says that it stops."""
        return self.status == "offline"


# --- The capacity questions and answers -------------------------------------------------------


class CapacityShow(_Message):
    """The question ``capacity.show.v1``: what has this one agent?"""

    agent_id: _Uuid


class CapacityQuery(_Message):
    """The question ``capacity.find.v1``: which agents can take this now?

    Sizes are GiB, cores whole cores. ``agent_type: null`` means any type, and so for the other
    filters; ``capabilities`` must all be there. An agent whose value is unknown has 0 of it.
    """

    min_gpu_vram_gb: _Gigabytes = 0.0
    min_single_gpu_vram_gb: Annotated[
        _Gigabytes, Field(description="GiB available on one GPU: many small ones do not add up.")
    ] = 0.0
    min_cpu_cores: _Count = 1
    min_memory_gb: _Gigabytes = 0.0
    agent_type: AgentType | None = "desktop"
    pool_name: _Word | None = None
    gpu_type: _Vendor | None = None
    capabilities: _Capabilities = Field(default_factory=list)
    limit: Annotated[int, Field(ge=1, le=MAX_OFFERS)] = 100
    explain: bool = False


class Offer(_Message):
    """An agent that can take what was asked for, as of its last heartbeat.

    ``gpu_sample_age_seconds`` is how old the GPU readings were when that heartbeat was sent.
    """

    agent_id: _Uuid
    agent_type: str
    pool_name: str
    hostname: str | None
    status: str
    gpu_type: str | None
    gpu_vram_available_gb: float | None
    gpu_vram_max_available_gb: float | None = None
    gpu_vram_total_gb: float | None
    gpu_sample_age_seconds: float | None = None
    cpu_cores_available: int | None
    cpu_load_1min: float | None
    memory_available_gb: float | None
    performance_score: float
    last_heartbeat_at: _Time
    heartbeat_age_seconds: Annotated[float, Field(ge=0)]


class CapacityOffers(_Message):
    """The answer ``capacity.offers.v1``, best first.

    Most free VRAM first, then most free cores, then ``performance_score``, then ``agent_id``.
    ``total_matches`` is exact where ``total_relation`` is ``eq``, a lower bound where ``gte``.
    ``degraded``: we do not trust our own view now, agents may be missing from it.
    """

    as_of: _Time
    degraded: bool
    total_matches: Annotated[int, Field(ge=0)]
    total_relation: Literal["eq", "gte"]
    agents: list[Offer]


class AgentCapacity(_Message):
    """The answer ``capacity.agent.v1``: one agent's last reported resources.

    An agent that has never reported metrics has zeros and ``gpu_type: "none"``. ``timestamp`` is
    when its last heartbeat was received, ``null`` before the first.
    """

    agent_id: _Uuid
    status: str
    cpu_percent: float | None
    cpu_cores_physical: int | None
    cpu_cores_available: int | None
    cpu_load_1min: float | None
    cpu_load_5min: float | None
    memory_percent: float | None
    memory_available_gb: float | None
    gpu_vram_total_gb: float | None
    gpu_vram_available_gb: float | None
    gpu_vram_max_available_gb: float | None = None
    gpu_type: str | None
    gpu_sample_age_seconds: float | None = None
    timestamp: _Time | None
    heartbeat_age_seconds: Annotated[float, Field(ge=0)] | None


class ErrorReply(_Message):
    """The answer ``error.v1``: a code for programs, a sentence for people."""

    code: ErrorCode
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


# --- The events -------------------------------------------------------------------------------


class AgentEvent(_Message):
    """An agent's status changed, and that is committed. ``at`` is the orchestrator's clock.

    ``reason`` is why it is offline, ``null`` for the other states.
    """

    agent_id: _Uuid
    pool_name: str
    hostname: str | None
    status: AgentStatus
    reason: str | None
    at: _Time

    @property
    def routing_key(self) -> str:
        """The key it is published with."""
        return f"agent.{self.agent_id}.{self.status}"


class FleetEvent(_Message):
    """Most of a pool fell silent at once (``degraded``), or speaks again (``recovered``)."""

    state: Literal["degraded", "recovered"]
    pool_name: str
    at: _Time

    @property
    def routing_key(self) -> str:
        """The key it is published with."""
        return f"fleet.{self.state}"


BODIES: dict[str, type[BaseModel]] = {
    STATUS_UPDATE: StatusUpdate,
    CAPACITY_SHOW: CapacityShow,
    CAPACITY_FIND: CapacityQuery,
    CAPACITY_AGENT: AgentCapacity,
    CAPACITY_OFFERS: CapacityOffers,
    ERROR: ErrorReply,
    AGENT_EVENT: AgentEvent,
    FLEET_EVENT: FleetEvent,
}
"""Every message of the contract by its AMQP ``type``."""


def _most_on_one_gpu(data: dict[str, Any]) -> Any:
    """Return what an agent that does not say so has available on one GPU; ``None`` if unknown.

    ``data`` has not been checked yet: what does not fit is left for the checks to name.
    """
    scalar, gpus = data.get("gpu_vram_available_gb"), data.get("gpus")
    if not isinstance(gpus, list) or len(gpus) < 2 or not isinstance(scalar, int | float):
        return scalar
    said = [
        gpu.get("vram_available_gb")
        if isinstance(gpu, dict)
        else getattr(gpu, "vram_available_gb", None)
        for gpu in gpus
    ]
    # A card with more than the scalar is another vendor's, unless it is a matter of rounding.
    own = [one for one in said if isinstance(one, int | float) and 0 <= one <= scalar + 0.1]
    return min(max(own), scalar) if own else None


def _at_most(message: BaseModel, available: str, total: str) -> None:
    least, most = getattr(message, available), getattr(message, total)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{available} is more than {total}")
