"""Room: what is left on an agent, and whether and where a request fits.

The one rule for ``find``, ``explain``, ``reserve``, ``wait``, the page and the CLI. Pure functions
of what an agent reported and what is reserved on it; docs/reservations.md says why the arithmetic
is as it is. SQL only leaves out by index what this would refuse.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any
from uuid import UUID

from chiffon.contract.messages import CapacityQuery, CapacityReserve
from chiffon.registry.rows import Available, Candidate

MOST_RESERVATIONS = 128
"""On one agent: every heartbeat of it looks at all of them."""

AMOUNTS: Mapping[str, str] = {
    "min_gpu_vram_gb": "vram_gb",
    "min_single_gpu_vram_gb": "single_gpu_vram_gb",
    "min_cpu_cores": "cores",
    "min_memory_gb": "memory_gb",
}
"""The rules about amounts, and the fields of ``Available`` that they are about, in its order."""

SCOPE = ("pool_name", "agent_type", "gpu_type", "capabilities")
"""The rules about who an agent is."""

RULES = (
    "agent_id",
    *SCOPE,
    "offline",
    "busy",
    "drained",
    "silent",
    "disconnected",
    "no_metrics",
    "malformed_metrics",
    *AMOUNTS,
    "gpus",
)
"""Every rule of an offer, in the order in which an agent is counted with the first that it breaks.
``gpus`` is judged where no other is broken: room for what is to be reserved."""

RELAXABLE = frozenset(("agent_id", *SCOPE, *AMOUNTS, "gpus"))
"""The rules that who asks can change: the others are the agents' state."""

_MOST = 1e15
_DIGITS = 6
"""Of GiB, about a kilobyte: what is taken off and given back in any order is the same again."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one agent must have, and what is to be reserved on it (nothing for a question).

    ``least``: the amounts of ``needs``.
    """

    needs: CapacityQuery
    least: Available
    agent_id: UUID | None = None
    gpus: int = 0
    gpu_vram_gb: float = 0.0
    cpu_cores: int = 0
    memory_gb: float = 0.0

    @classmethod
    def of(cls, request: CapacityQuery | CapacityReserve) -> "Wanted":
        """Return what a question or a request wants of one agent."""
        needs = request if isinstance(request, CapacityQuery) else request.needs()
        least = Available(**{name: getattr(needs, rule) for rule, name in AMOUNTS.items()})
        if isinstance(request, CapacityQuery):
            return cls(needs, least)
        return cls(
            needs,
            least,
            request.agent_id,
            request.gpus,
            request.gpu_vram_gb,
            request.cpu_cores,
            request.memory_gb,
        )

    @property
    def reserves(self) -> bool:
        """Whether something is to be reserved, beyond amounts."""
        return self.gpus > 0


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """One GPU; ``idle_gb`` is what would be free without the observed use of reservations."""

    key: str
    uuid: str | None
    index: int
    is_unified: bool
    available_gb: float
    idle_gb: float


@dataclass(frozen=True, slots=True)
class Room:
    """What is left on an agent, by GPU as well; the GPUs are those of its scalar VRAM."""

    gpus: tuple[GpuRoom, ...]
    vram_gb: float
    cores: float
    idle_cores: float
    memory_gb: float
    idle_memory_gb: float

    @property
    def available(self) -> Available:
        """The amounts that questions are about."""
        single = max((gpu.available_gb for gpu in self.gpus), default=0.0)
        return Available(self.vram_gb, single, self.cores, self.memory_gb)


@dataclass(frozen=True, slots=True)
class _Use:
    """What one reservation took of one resource.

    ``free_before``: what was free before it; ``observed``: what its processes are seen to use,
    ``None`` where nobody knows.
    """

    taken: float
    free_before: float
    observed: float | None


def _left(live: float, total: float | None, uses: Sequence[_Use]) -> float:
    """Return what is left of one resource, of which ``live`` is free now.

    Args:
        live: What the agent reports as free.
        total: All there is; ``None`` if that is not known.
        uses: Of the reservations, in the order in which they were made.
    """
    reserved = sum(use.taken for use in uses)
    idle = live + sum(use.observed for use in uses if use.observed is not None)
    pending = sum(max(use.taken - use.observed, 0.0) for use in uses if use.observed is not None)
    most = max([idle, *(use.free_before for use in uses)])
    # What became less between one reservation and the next is the use of that one or of an earlier
    # one, and of no later one.
    vague = [use for use in uses if use.observed is None]
    unexplained = 0.0
    for use, later in zip_longest(vague, vague[1:]):
        until_next = max(idle if later is None else later.free_before, idle)
        used = max(0.0, use.free_before - until_next)
        unexplained = max(0.0, unexplained + use.taken - used)
    bound = (most if total is None else total) - reserved
    return round(max(0.0, min(bound, live - pending - unexplained)), _DIGITS)


def room(metrics: Any, reserved: Mapping[str, Any]) -> Room:
    """Return what is left on an agent.

    Args:
        metrics: What it reported, in the contract's words; whatever else anybody wrote there.
        reserved: What is reserved on it, by the ids of the reservations.
    """
    told: Mapping[str, Any] = metrics if isinstance(metrics, dict) else {}
    entries = _in_order(reserved)
    # Of two about one reservation the first counts.
    observed = {str(one.get("reservation_id")): one for one in _dicts(told.get("observed"))[::-1]}
    seen = [observed.get(reservation_id) for reservation_id, _ in entries]

    uses = [
        _use(entry.get("memory"), None if one is None else _number(one.get("memory_gb")))
        for (_, entry), one in zip(entries, seen, strict=True)
    ]
    live_memory = _number(told.get("memory_available_gb")) or 0.0
    memory, idle_memory = _left(live_memory, None, uses), live_memory + _seen(uses)

    uses = [
        # What is free is told in whole cores, so what is busy of one counts as one.
        _use(entry.get("cores"), _ceiling(None if one is None else _number(one.get("cpu_cores"))))
        for (_, entry), one in zip(entries, seen, strict=True)
    ]
    live_cores = _number(told.get("cpu_cores_available", 1)) or 0.0
    cores, idle_cores = math.floor(_left(live_cores, None, uses)), live_cores + _seen(uses)

    gpus = tuple(_gpu_rooms(told, entries, seen, memory))
    scalar = _number(told.get("gpu_vram_available_gb")) or 0.0
    vram = min(round(sum(gpu.available_gb for gpu in gpus), _DIGITS), scalar)
    return Room(gpus, vram, cores, idle_cores, memory, idle_memory)


def available(candidate: Candidate) -> Available:
    """Return what can be taken of an agent; what is unknown is 0."""
    if candidate.reserved_text is None:
        return Available(
            candidate.free_vram_gb,
            candidate.free_single_gpu_vram_gb,
            candidate.free_cores,
            candidate.free_memory_gb,
        )
    return room(candidate.metrics, candidate.reserved).available


def broken(candidate: Candidate, wanted: Wanted) -> list[str]:
    """Return the rules that an agent breaks, in the order of ``RULES``."""
    rules = _broken_by_identity(candidate, wanted) + _broken_by_state(candidate)
    amounts = zip(AMOUNTS, available(candidate), wanted.least, strict=True)
    rules += [rule for rule, has, least in amounts if has < least]
    if not rules and wanted.reserves and allocate(candidate, wanted) is None:
        rules.append("gpus")
    return rules


def fits(candidate: Candidate, wanted: Wanted) -> bool:
    """Return whether an agent breaks no rule."""
    return not broken(candidate, wanted)


def _broken_by_identity(candidate: Candidate, wanted: Wanted) -> list[str]:
    needs, rules = wanted.needs, []
    if wanted.agent_id is not None and candidate.agent_id != wanted.agent_id:
        rules.append("agent_id")
    if needs.pool_name is not None and candidate.pool_name != needs.pool_name:
        rules.append("pool_name")
    if needs.agent_type is not None and candidate.agent_type != needs.agent_type:
        rules.append("agent_type")
    if needs.gpu_type is not None and candidate.gpu_type != needs.gpu_type:
        rules.append("gpu_type")
    if needs.capabilities and not set(needs.capabilities) <= set(candidate.capabilities):
        rules.append("capabilities")
    return rules


def _broken_by_state(candidate: Candidate) -> list[str]:
    rules = []
    if candidate.status in ("offline", "busy"):
        rules.append(candidate.status)
    if candidate.drained:
        rules.append("drained")
    if not candidate.is_fresh:
        rules.append("silent")
    elif candidate.is_hidden:
        rules.append("disconnected")
    if candidate.metrics_sound is None:
        rules.append("no_metrics")
    elif not candidate.metrics_sound:
        rules.append("malformed_metrics")
    return rules


def allocate(candidate: Candidate, wanted: Wanted) -> dict[str, Any] | None:
    """Return what a reservation takes of an agent, as it is kept there; ``None`` if it is no fit.

    The GPUs with most room are taken first. Of a GPU without memory of its own the host's memory is
    taken as well.
    """
    reserved = candidate.reserved
    if len(reserved) >= MOST_RESERVATIONS:
        return None
    left = room(candidate.metrics, reserved)
    gpus: list[GpuRoom] = []
    if wanted.gpu_vram_gb > 0:
        enough = [gpu for gpu in left.gpus if gpu.available_gb >= wanted.gpu_vram_gb]
        enough.sort(key=lambda gpu: (-gpu.available_gb, gpu.index, gpu.key))
        gpus = enough[: wanted.gpus]
        if len(gpus) < wanted.gpus:
            return None
    memory_gb = wanted.memory_gb + wanted.gpu_vram_gb * sum(gpu.is_unified for gpu in gpus)
    if left.cores < wanted.cpu_cores or left.memory_gb < memory_gb:
        return None
    return {
        "gpus": {gpu.key: [wanted.gpu_vram_gb, gpu.idle_gb, gpu.index] for gpu in gpus},
        "cores": [wanted.cpu_cores, left.idle_cores],
        "memory": [memory_gb, left.idle_memory_gb],
        "chosen": [
            {"uuid": gpu.uuid, "index": gpu.index, "vram_gb": wanted.gpu_vram_gb} for gpu in gpus
        ],
    }


def _gpu_rooms(
    told: Mapping[str, Any],
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    seen: Sequence[Mapping[str, Any] | None],
    memory: float,
) -> Iterator[GpuRoom]:
    vendor = _text(told.get("gpu_type"))
    scalar = _number(told.get("gpu_vram_available_gb"))
    kept = told.get("kept")
    kept_gb = (_number(kept.get("gpu_vram_gb")) if isinstance(kept, dict) else None) or 0.0
    listed = _dicts(told.get("gpus"))
    gpus = listed
    if not listed and scalar is not None and vendor != "none":
        gpus = [
            {
                "index": 0,
                "vram_total_gb": told.get("gpu_vram_total_gb"),
                "vram_available_gb": scalar,
            }
        ]
    for gpu in gpus:
        live, own = _number(gpu.get("vram_available_gb")), _text(gpu.get("gpu_type"))
        is_anothers = own is not None and vendor is not None and own != vendor
        # A card with more than the scalar is another vendor's, unless it is a matter of rounding.
        if live is None or live > (scalar or 0.0) + 0.1 or is_anothers:
            continue
        uses = list(_gpu_uses(gpu, entries, seen, is_only=not listed))
        total = _number(gpu.get("vram_total_gb"))
        left = _left(live, None if total is None else total - kept_gb, uses)
        is_unified = gpu.get("is_unified") is True
        yield GpuRoom(
            key=gpu_key(gpu),
            uuid=_text(gpu.get("uuid")),
            index=max(math.floor(_number(gpu.get("index")) or 0), 0),
            is_unified=is_unified,
            # It has no memory of its own: what jobs hold of the host's is gone for it as well.
            available_gb=min(left, memory) if is_unified else left,
            idle_gb=live + _seen(uses),
        )


def _gpu_uses(
    gpu: Mapping[str, Any],
    entries: Sequence[tuple[str, Mapping[str, Any]]],
    seen: Sequence[Mapping[str, Any] | None],
    *,
    is_only: bool,
) -> Iterator[_Use]:
    key, has_uuid = gpu_key(gpu), isinstance(gpu.get("uuid"), str)
    for (_, entry), one in zip(entries, seen, strict=True):
        parts = entry.get("gpus")
        for name, part in parts.items() if isinstance(parts, dict) else ():
            # A driver may fail to tell a GPU's UUID for once: then it is known by its index.
            is_by_index = not has_uuid or name.startswith("index ")
            is_same_index = isinstance(part, list) and len(part) > 2 and part[2] == gpu.get("index")
            if name == key or is_only or (is_by_index and is_same_index):
                yield _use(part, None if one is None else _observed_vram(one, key))


def _observed_vram(one: Mapping[str, Any], key: str) -> float | None:
    # A GPU that is not listed is not used; of one without a number nobody knows.
    used = [_number(gpu.get("vram_gb")) for gpu in _dicts(one.get("gpus")) if gpu_key(gpu) == key]
    known = [vram for vram in used if vram is not None]
    return sum(known) if len(known) == len(used) else None


def gpu_key(gpu: Mapping[str, Any]) -> str:
    """Return what a GPU is known by: its UUID, or its index where the driver tells none."""
    uuid = gpu.get("uuid")
    return uuid if isinstance(uuid, str) else f"index {gpu.get('index') or 0}"


def _in_order(reserved: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what is reserved, in the order of fences; one without a fence is the newest."""
    entries = [(key, entry) for key, entry in reserved.items() if isinstance(entry, dict)]

    def fence(item: tuple[str, Mapping[str, Any]]) -> float:
        number = _number(item[1].get("fence"))
        return math.inf if number is None else number

    return sorted(entries, key=fence)


def _use(part: Any, observed: float | None) -> _Use:
    taken, free_before, *_ = [*part, 0.0, 0.0] if isinstance(part, list) else (0.0, 0.0)
    return _Use(_number(taken) or 0.0, _number(free_before) or 0.0, observed)


def _seen(uses: Sequence[_Use]) -> float:
    return sum(use.observed for use in uses if use.observed is not None)


def _ceiling(value: float | None) -> float | None:
    return None if value is None else float(math.ceil(value))


def _number(value: Any) -> float | None:
    # Rows may have been written by others: a truth value is no number, and a number is bounded.
    if type(value) not in (int, float):
        return None
    return float(min(max(value, -_MOST), _MOST))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
