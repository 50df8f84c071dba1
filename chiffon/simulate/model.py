"""What the registry must hold after a simulation, and where it differs.

The model knows only what agents said and the broker confirmed. It shares no line with the SQL
that it judges.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from chiffon.contract.messages import (
    CapacityOffers,
    CapacityQuery,
    Offer,
    ResourceMetrics,
    StatusUpdate,
)
from chiffon.registry.rows import AgentRow

RECENT = 3


@dataclass
class Expected:
    """One agent as the registry must have it.

    ``skew_seconds``: by how much its clock is ahead. ``is_silent``: it became silent for good.
    ``farewells``: how often it said that it stops.
    """

    agent_id: UUID
    skew_seconds: float = 0.0
    newest: StatusUpdate | None = None
    recent: deque[ResourceMetrics] = field(default_factory=lambda: deque(maxlen=RECENT))
    is_silent: bool = False
    farewells: int = 0

    def confirm(self, update: StatusUpdate) -> None:
        """Note that the broker confirmed a heartbeat; an older one changes nothing."""
        if self.newest is not None and update.order <= self.newest.order:
            return
        self.newest = update
        if update.resources is not None:
            self.recent.append(update.resources)

    @property
    def is_offered(self) -> bool:
        """Whether it may be offered."""
        return self.newest is not None and self.newest.status == "online" and not self.is_silent


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it must be."""

    where: str
    what: str


def of_rows(
    fleet: Sequence[Expected], rows: Iterable[AgentRow], *, is_outage: bool
) -> Iterator[Difference]:
    """Compare the registry's rows, all of them.

    Args:
        fleet: What must be there.
        rows: What is there.
        is_outage: Whether so many became silent that nobody may be marked offline for it.
    """
    found = {row.agent_id: row for row in rows}
    for one in fleet:
        row = found.pop(one.agent_id, None)
        if one.newest is None and row is None:
            continue
        if one.newest is None or row is None:
            known = "is there and was never confirmed" if row else "is not in the registry"
            yield Difference(str(one.agent_id), known)
            continue
        yield from _of_row(one, one.newest, row, is_outage=is_outage)
    for agent_id in found:
        yield Difference(str(agent_id), "nobody simulated it")


def _of_row(
    one: Expected, newest: StatusUpdate, row: AgentRow, *, is_outage: bool
) -> Iterator[Difference]:
    status, reason = _status(one, newest, is_outage=is_outage)
    pairs = {
        "order": (newest.order, (row.incarnation, row.sequence)),
        "status": (status, row.status),
        "reason": (reason, (row.status_reason or "").partition(" ")[0] or None),
        "agent_type": (newest.agent_type, row.agent_type),
        "pool_name": (newest.pool_name, row.pool_name),
        "capabilities": (newest.capabilities, row.capabilities),
        "hostname": (newest.hostname, row.hostname),
        "interval_seconds": (newest.interval_seconds, row.interval_seconds),
    }
    for name, (wanted, is_now) in pairs.items():
        if wanted != is_now:
            yield Difference(str(one.agent_id), f"{name} is {is_now!r}, must be {wanted!r}")
    # Two orchestrators may take a farewell before the heartbeat ahead of it.
    allowed = list(one.recent)[-1 if newest.resources is not None else -RECENT :]
    if row.resource_metrics not in [metrics.model_dump(mode="json") for metrics in allowed]:
        yield Difference(str(one.agent_id), "its metrics are not those it sent last")
    skew = row.clock_skew_seconds
    if skew is None or abs(skew - one.skew_seconds) > row.lease_seconds:
        yield Difference(str(one.agent_id), f"skew is {skew}, must be about {one.skew_seconds}")


def _status(one: Expected, newest: StatusUpdate, *, is_outage: bool) -> tuple[str, str | None]:
    """Return its status, and the first word of the reason."""
    if newest.is_farewell:
        return "offline", "farewell"
    if one.is_silent and not is_outage:
        return "offline", "missed"
    return newest.status, None


def of_offers(
    fleet: Sequence[Expected], query: CapacityQuery, offers: CapacityOffers, *, is_outage: bool
) -> Iterator[Difference]:
    """Compare one answer: who is offered, with what, in which order, and how many in all."""
    where = f"find({query.model_dump_json(exclude_defaults=True)})"
    wanted = sorted((one for one in fleet if _fits(one, query)), key=_rank)
    ids = [one.agent_id for one in wanted[: query.limit]]
    if [offer.agent_id for offer in offers.agents] != ids:
        missing = len(set(ids) - {offer.agent_id for offer in offers.agents})
        extra = len({offer.agent_id for offer in offers.agents} - set(ids))
        yield Difference(where, f"{missing} not offered, {extra} wrongly offered, or out of order")
    relation = "eq" if len(wanted) <= query.limit else "gte"
    if (offers.total_matches, offers.total_relation) != (len(ids), relation):
        yield Difference(where, f"{offers.total_matches} {offers.total_relation}: {len(wanted)}")
    if is_outage and not offers.degraded:
        yield Difference(where, "not degraded")
    metrics = {one.agent_id: one.recent[-1] for one in wanted}
    for offer in offers.agents:
        sent = metrics.get(offer.agent_id)
        if sent is not None and any(getattr(offer, name) != getattr(sent, name) for name in _SAME):
            yield Difference(where, f"what {offer.agent_id} has is not what it sent last")


_SAME = [name for name in ResourceMetrics.model_fields if name in Offer.model_fields]


def _fits(one: Expected, query: CapacityQuery) -> bool:
    if not one.is_offered or one.newest is None:
        return False
    metrics, newest = one.recent[-1], one.newest
    return (
        (metrics.gpu_vram_available_gb or 0.0) >= query.min_gpu_vram_gb
        and (metrics.gpu_vram_max_available_gb or 0.0) >= query.min_single_gpu_vram_gb
        and (metrics.cpu_cores_available or 0) >= query.min_cpu_cores
        and (metrics.memory_available_gb or 0.0) >= query.min_memory_gb
        and query.agent_type in (None, newest.agent_type)
        and query.pool_name in (None, newest.pool_name)
        and query.gpu_type in (None, metrics.gpu_type)
        and set(query.capabilities) <= set(newest.capabilities)
    )


def _rank(one: Expected) -> tuple[float, int, UUID]:
    metrics = one.recent[-1]
    vram, cores = metrics.gpu_vram_available_gb or 0.0, metrics.cpu_cores_available or 0
    return -vram, -cores, one.agent_id


def of_events(
    fleet: Sequence[Expected], told: Mapping[UUID, int], *, is_outage: bool
) -> Iterator[Difference]:
    """Compare how often an agent was told to be offline; an event that is missing is no difference.

    One too many is an agent that was marked while it spoke, or twice.
    """
    for one in fleet:
        wanted = _offlines(one, is_outage=is_outage)
        if told.get(one.agent_id, 0) > wanted:
            many = f"told offline {told[one.agent_id]} times, must be {wanted}"
            yield Difference(str(one.agent_id), many)


def missed_events(fleet: Sequence[Expected], told: Mapping[UUID, int], *, is_outage: bool) -> int:
    """Return how many offlines were not told: events are hints."""
    return sum(
        max(_offlines(one, is_outage=is_outage) - told.get(one.agent_id, 0), 0) for one in fleet
    )


def _offlines(one: Expected, *, is_outage: bool) -> int:
    return one.farewells + (one.is_silent and not is_outage)
