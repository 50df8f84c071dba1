"""The wire contract, version 1: what may be said, and how it is written down.

Bodies are JSON in UTF-8; the AMQP property ``type`` names the message. Unknown fields are
ignored, so that fields can be added; everything else that does not fit is refused with one line
that names the field. ``_gb`` means GiB (2^30 bytes). ``null`` means unknown and is never written
as 0; 0 means a known zero.

Senders that are not chiffon build these bodies by hand from the JSON Schema that
``chiffon schema jsonschema`` prints; nothing here depends on Python on the other side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from chiffon.errors import BadMessage

STATUS_UPDATE = "status_update.v1"
CANARY = "canary.v1"
CAPACITY_SHOW = "capacity.show.v1"
CAPACITY_FIND = "capacity.find.v1"
CAPACITY_AGENT = "capacity.agent.v1"
CAPACITY_OFFERS = "capacity.offers.v1"
ERROR = "error.v1"

KIB = 1024
MAX_MESSAGE_BYTES = 64 * KIB
MAX_ARRAY_BYTES = 1024 * KIB
MAX_ARRAY_HEARTBEATS = 1_000
MAX_REPLY_BYTES = 1024 * KIB
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
    """One GPU as its driver describes it; ``null`` where the driver does not say."""

    uuid: _Name | None = None
    index: _Count
    name: _Name | None = None
    vram_total_gb: _Gigabytes | None = None
    vram_available_gb: _Gigabytes | None = None
    utilization_percent: _Percent | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Gpu":
        _at_most(self, "vram_available_gb", "vram_total_gb")
        return self


class ResourceMetrics(_Message):
    """What the probes read on one host. The ten scalar fields are the contract.

    A scalar that is left out is unknown, the same as ``null``. ``gpu_type: "none"`` says that
    the host has no GPU, so both VRAM fields are a known 0. An agent without ``gpus`` counts as
    one device with the scalar VRAM.
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
    gpu_type: _Vendor | None = Field(None, description='"none" where the host has no GPU.')
    gpus: Annotated[list[Gpu], Field(max_length=64)] = Field(default_factory=list)
    probe_errors: Annotated[list[_Line], Field(max_length=64)] = Field(
        default_factory=list, description="Why a value is unknown, one line each."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_gpu_is_a_known_zero(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("gpu_type") == "none":
            known = {key: 0.0 for key in _VRAM if data.get(key) is None}
            return {**data, **known}
        return data

    @model_validator(mode="after")
    def _fits(self) -> "ResourceMetrics":
        _at_most(self, "gpu_vram_available_gb", "gpu_vram_total_gb")
        if self.gpu_type == "none" and (self.gpu_vram_total_gb or self.gpu_vram_available_gb):
            raise ValueError('gpu_type is "none" but there is VRAM')
        if len({gpu.index for gpu in self.gpus}) != len(self.gpus):
            raise ValueError("gpus: two have the same index")
        return self


_VRAM = ("gpu_vram_total_gb", "gpu_vram_available_gb")

SCALAR_METRICS: tuple[str, ...] = tuple(
    name for name in ResourceMetrics.model_fields if name not in {"gpus", "probe_errors"}
)
"""The ten metric fields of the contract, in the order in which they are shown."""


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
    min_cpu_cores: _Count = 1
    min_memory_gb: _Gigabytes = 0.0
    agent_type: AgentType | None = "desktop"
    pool_name: _Word | None = None
    gpu_type: _Vendor | None = None
    capabilities: _Capabilities = Field(default_factory=list)
    limit: Annotated[int, Field(ge=1, le=MAX_OFFERS)] = 100
    explain: bool = False


class Offer(_Message):
    """An agent that can take what was asked for, as of its last heartbeat."""

    agent_id: _Uuid
    agent_type: str
    pool_name: str
    hostname: str | None
    status: str
    gpu_type: str | None
    gpu_vram_available_gb: float | None
    gpu_vram_total_gb: float | None
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
    gpu_type: str | None
    timestamp: _Time | None
    heartbeat_age_seconds: Annotated[float, Field(ge=0)] | None


class ErrorReply(_Message):
    """The answer ``error.v1``: a code for programs, a sentence for people."""

    code: ErrorCode
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


BODIES: dict[str, type[BaseModel]] = {
    STATUS_UPDATE: StatusUpdate,
    CAPACITY_SHOW: CapacityShow,
    CAPACITY_FIND: CapacityQuery,
    CAPACITY_AGENT: AgentCapacity,
    CAPACITY_OFFERS: CapacityOffers,
    ERROR: ErrorReply,
}
"""Every message of the contract by its AMQP ``type``."""


# --- Encoding and decoding --------------------------------------------------------------------

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A heartbeat that was refused: its own JSON, and why."""

    body: bytes
    reason: str


def encode(message: BaseModel) -> bytes:
    """Return the body to send: JSON in UTF-8, times as ISO 8601."""
    return message.model_dump_json().encode()


def decode(kind: type[Body], body: bytes, limit: int = MAX_MESSAGE_BYTES) -> Body:
    """Read one message that is not a heartbeat.

    Args:
        kind: The message that the AMQP ``type`` names.
        body: The body as it came.
        limit: The largest body to look at, in bytes.

    Returns:
        The message, every field checked.

    Raises:
        BadMessage: It does not fit; the reason names the field.
    """
    return _validate(kind, _parse(body, limit))


def decode_heartbeats(
    body: bytes, routing_key: str
) -> tuple[list[StatusUpdate], Sequence[Refusal]]:
    """Read a heartbeat, or a relay's array of them.

    Args:
        body: The body as it came.
        routing_key: The key it came with. ``heartbeat.<pool>.<agent_type>.<agent_id>`` must
            agree with the body; a relay's ``heartbeat.<pool>.relay.<relay_id>`` binds nothing.

    Returns:
        The heartbeats that fit, and a refusal for each element of an array that does not: a bad
        element costs only itself. A single heartbeat that fits has no refusals.

    Raises:
        BadMessage: Nothing of the body can be used.
    """
    content = _parse(body, MAX_ARRAY_BYTES)
    if not isinstance(content, list):
        if len(body) > MAX_MESSAGE_BYTES:
            raise BadMessage(_too_large(len(body), MAX_MESSAGE_BYTES))
        return [_heartbeat(content, routing_key)], ()
    if len(content) > MAX_ARRAY_HEARTBEATS:
        raise BadMessage(f"{len(content)} heartbeats in one array; at most {MAX_ARRAY_HEARTBEATS}")
    good: list[StatusUpdate] = []
    bad: list[Refusal] = []
    for position, element in enumerate(content):
        try:
            good.append(_heartbeat(element, routing_key))
        except BadMessage as error:
            reason = f"element {position} of {len(content)}: {error}"
            bad.append(Refusal(_reencode(element), reason))
    return good, bad


def routing_key(update: StatusUpdate) -> str:
    """Return the routing key that belongs to this heartbeat."""
    return f"heartbeat.{update.pool_name}.{update.agent_type}.{update.agent_id}"


def json_schema() -> dict[str, Any]:
    """Return one JSON Schema (2020-12) document with every message under ``$defs``.

    ``x-amqp-types`` maps each AMQP ``type`` to its definition.
    """
    from pydantic.json_schema import models_json_schema

    _, schema = models_json_schema(
        [(model, "validation") for model in BODIES.values()],
        title="chiffon wire contract, version 1",
        description=(__doc__ or "").strip(),
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "x-amqp-types": {
            name: {"$ref": f"#/$defs/{model.__name__}"} for name, model in BODIES.items()
        },
    }


def _heartbeat(content: Any, key: str) -> StatusUpdate:
    update = _validate(StatusUpdate, content)
    words = key.split(".")
    is_relay = len(words) == 4 and words[2] == "relay"
    if not is_relay and key.lower() != routing_key(update).lower():
        raise BadMessage(
            f"routing key {_short(key)} does not agree with the body, which belongs to "
            f"{routing_key(update)}"
        )
    return update


def _parse(body: bytes, limit: int) -> Any:
    if len(body) > limit:
        raise BadMessage(_too_large(len(body), limit))
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadMessage(f"not JSON: {error}" if body else "not JSON: the body is empty") from None


def _validate(kind: type[Body], content: Any) -> Body:
    if not isinstance(content, dict):
        raise BadMessage(f"expected a JSON object, got {type(content).__name__}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadMessage(first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """Return one line for people: the first field that does not fit, and why.

    The value itself is left out: it may be long, or a secret, or made to confuse a terminal.
    """
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(_short(str(part)) for part in problems[0]["loc"])
    what = problems[0]["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _at_most(message: BaseModel, available: str, total: str) -> None:
    least, most = getattr(message, available), getattr(message, total)
    if least is not None and most is not None and least > most:
        raise ValueError(f"{available} is more than {total}")


def _too_large(size: int, limit: int) -> str:
    return f"{size} bytes; at most {limit}"


def _short(text: str) -> str:
    """Return at most 64 characters of ``text`` with everything unprintable escaped."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= 64 else f"{escaped[:61]}..."


def _reencode(element: Any) -> bytes:
    from pydantic_core import to_json

    return to_json(element, inf_nan_mode="constants")
