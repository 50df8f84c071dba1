"""The heartbeat: who speaks, in which order, until when it speaks again, and what its host has."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from chiffon.contract.fields import (
    MAX_COUNT,
    MAX_INTEGER,
    AgentStatus,
    AgentType,
    Capabilities,
    Count,
    Gigabytes,
    Line,
    Load,
    Message,
    Name,
    Ordinal,
    Percent,
    Seconds,
    Time,
    Uuid,
    Vendor,
    WholeNumber,
    Word,
    absent_if_empty,
)


class Gpu(Message):
    """One GPU, or one MIG instance of it, as its driver describes it; ``null`` if it does not say.

    ``gpu_type`` is its vendor; reservations take GPUs of the vendor that the scalars speak for.
    ``is_unified``: it has no memory of its own. Its VRAM is the host's memory, so the same GiB
    stand in ``memory_available_gb`` as well.
    """

    uuid: Name | None = None
    index: Count
    name: Name | None = None
    gpu_type: Annotated[Vendor | None, Field(exclude_if=absent_if_empty)] = None
    vram_total_gb: Gigabytes | None = None
    vram_available_gb: Gigabytes | None = None
    utilization_percent: Percent | None = None
    is_unified: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "Gpu":
        _none_above_the_next(self.__dict__, ("vram_available_gb", "vram_total_gb"))
        return self


class Kept(Message):
    """What the operator keeps for the host's owner; it is not in the available values."""

    cpu_cores: Annotated[float, Field(ge=0, le=MAX_COUNT)] = 0.0
    memory_gb: Gigabytes = 0.0
    gpu_vram_gb: Annotated[Gigabytes, Field(description="GiB of each GPU.")] = 0.0


class ObservedGpu(Message):
    """What the processes of one reservation use of one GPU; ``null`` if that cannot be read."""

    uuid: Name | None = None
    index: Count
    vram_gb: Gigabytes | None = None


class Observed(Message):
    """What the processes use that were tied to a reservation.

    A GPU that is not listed is not used by them. ``null`` is unknown: then it is guessed from what
    became less since the reservation was made.
    """

    reservation_id: Uuid
    gpus: Annotated[list[ObservedGpu], Field(max_length=64)] = Field(default_factory=list)
    cpu_cores: Load | None = Field(None, description="CPUs kept busy, possibly a fraction.")
    memory_gb: Gigabytes | None = None


class ResourceMetrics(Message):
    """What the probes read on one host. The scalar fields are the contract.

    A scalar that is left out is unknown, the same as ``null``, but for
    ``gpu_vram_max_available_gb``, which then follows from ``gpus``; an agent without ``gpus``
    counts as one device with the scalar VRAM. ``gpu_type: "none"`` says that the host has no
    GPU, so all VRAM fields are a known 0. With GPUs of several vendors the scalars speak for the
    one with most dedicated VRAM.
    """

    cpu_percent: Percent | None = Field(None, description="Busy share of all CPUs, 0 to 100.")
    cpu_cores_physical: Count | None = None
    cpu_cores_available: Count | None = Field(
        None, description="Whole cores free for a new job: floor(usable CPUs - busy CPUs)."
    )
    cpu_load_1min: Load | None = None
    cpu_load_5min: Load | None = None
    memory_percent: Percent | None = None
    memory_available_gb: Gigabytes | None = Field(None, description="GiB (2^30 bytes).")
    gpu_vram_total_gb: Gigabytes | None = Field(None, description="GiB over all GPUs.")
    gpu_vram_available_gb: Gigabytes | None = Field(None, description="GiB over all GPUs.")
    gpu_vram_max_available_gb: Gigabytes | None = Field(
        None, description="GiB, the most that is available on one GPU."
    )
    gpu_type: Vendor | None = Field(None, description='"none" where the host has no GPU.')
    gpus: Annotated[list[Gpu], Field(max_length=64)] = Field(default_factory=list)
    probe_errors: Annotated[list[Line], Field(max_length=64)] = Field(
        default_factory=list, description="Why a value is unknown, one line each."
    )
    gpu_sample_age_seconds: Seconds | None = Field(
        None, description="How old the GPU readings were when this was sent."
    )
    overridden: Annotated[list[Word], Field(max_length=64)] = Field(
        default_factory=list, description="Fields that the operator set, not the probes."
    )
    kept: Kept | None = None
    observed: Annotated[list[Observed], Field(max_length=256)] = Field(
        default_factory=list,
        description="What is known to be in use of reservations.",
        exclude_if=absent_if_empty,
    )

    @model_validator(mode="after")
    def _complete(self) -> "ResourceMetrics":
        # The message is frozen for everybody else: it is not made yet.
        fields = self.__dict__
        if fields["gpu_type"] == "none":
            if any(fields[key] for key in _VRAM):
                raise ValueError('gpu_type is "none" but there is VRAM')
            fields.update(dict.fromkeys(_VRAM, 0.0))
        elif "gpu_vram_max_available_gb" not in self.__pydantic_fields_set__:
            fields["gpu_vram_max_available_gb"] = self._most_on_one_gpu()
        _none_above_the_next(fields, _VRAM)
        if self.gpus and len({gpu.index for gpu in self.gpus}) != len(self.gpus):
            raise ValueError("gpus: two have the same index")
        return self

    def _most_on_one_gpu(self) -> float | None:
        """Return what an agent that does not say so has available on one; ``None`` if unknown."""
        scalar = self.gpu_vram_available_gb
        if scalar is None or len(self.gpus) < 2:
            return scalar
        said = [gpu.vram_available_gb for gpu in self.gpus]
        # A card with more than the scalar is another vendor's, unless it is a matter of rounding.
        own = [one for one in said if one is not None and one <= scalar + 0.1]
        return min(max(own), scalar) if own else None


_VRAM = ("gpu_vram_max_available_gb", "gpu_vram_available_gb", "gpu_vram_total_gb")
"""Each at most the next."""

SCALAR_METRICS: tuple[str, ...] = (
    "cpu_percent",
    "cpu_cores_physical",
    "cpu_cores_available",
    "cpu_load_1min",
    "cpu_load_5min",
    "memory_percent",
    "memory_available_gb",
    "gpu_vram_total_gb",
    "gpu_vram_available_gb",
    "gpu_vram_max_available_gb",
    "gpu_type",
)
"""The metric fields that every answer repeats, in the order in which they are shown."""


class StatusUpdate(Message):
    """One heartbeat: who speaks, in which order, until when it promises to speak again.

    (``incarnation``, ``sequence``) orders an agent's heartbeats: the first is its start time in
    unix milliseconds and grows with every start, the second counts from 1 within it. ``sent_at``
    is the sender's clock: shown, never compared with ours. ``status: "offline"`` is a farewell.
    """

    agent_id: Uuid
    agent_type: AgentType = "desktop"
    pool_name: Word = "default"
    capabilities: Capabilities = Field(default_factory=list)
    status: AgentStatus = "online"
    hostname: Name | None = None
    agent_version: Name | None = None
    incarnation: Ordinal
    sequence: Annotated[int, Field(ge=1, le=MAX_INTEGER), WholeNumber()]
    sent_at: Time
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


def _none_above_the_next(fields: Mapping[str, float | None], names: Sequence[str]) -> None:
    """Compare what is known of values in their order.

    Raises:
        ValueError: One of them is more than the next.
    """
    below, least = "", 0.0
    for name in names:
        value = fields[name]
        if value is None:
            continue
        if value < least:
            raise ValueError(f"{below} is more than {name}")
        below, least = name, value
