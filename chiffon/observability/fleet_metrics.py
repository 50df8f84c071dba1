"""What Prometheus reads of the fleet, looked up from the registry when somebody scrapes.

What is unknown has no sample, and the series of an agent that was forgotten are gone with the next
scrape.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from chiffon.capacity.service import describe
from chiffon.contract.messages import AgentCapacity
from chiffon.errors import ChiffonError
from chiffon.observability.metrics import Read
from chiffon.registry.registry import Registry
from chiffon.registry.rows import AgentRow

READ_SECONDS = 2.0

_GIB = 2**30


def fleet(registry: Registry, most_agents: int = 0) -> Read:
    """Return the metrics of the fleet as the registry has it.

    Args:
        registry: Where the fleet is; while it is away, only that is reported.
        most_agents: How many agents get series of their own; 0 for totals only.
    """

    async def read() -> list[Metric]:
        is_up = GaugeMetricFamily("chiffon_registry_up", "Whether the database answers.")
        try:
            async with asyncio.timeout(READ_SECONDS):
                summary = await registry.agents.summary()
                rows = await registry.agents.list(most=most_agents) if most_agents else []
        except (ChiffonError, TimeoutError):
            is_up.add_metric([], 0)
            return [is_up]
        is_up.add_metric([], 1)
        agents = GaugeMetricFamily("chiffon_agents", "Agents by status.", labels=["status"])
        for status in ("online", "busy", "offline"):
            agents.add_metric([status], summary.agents.get(status, 0))
        silent = GaugeMetricFamily(
            "chiffon_agents_silent", "Agents online or busy whose lease is over."
        )
        silent.add_metric([], summary.silent)
        degraded = GaugeMetricFamily(
            "chiffon_degraded", "Whether answers are marked as degraded, for any pool."
        )
        degraded.add_metric([], summary.degraded)
        held = GaugeMetricFamily("chiffon_reservations_held", "Reservations that are held.")
        held.add_metric([], summary.reservations)
        waiting = GaugeMetricFamily("chiffon_questions_waiting", "Questions that wait for room.")
        waiting.add_metric([], summary.waiting)
        totals: list[Metric] = [is_up, agents, silent, degraded, held, waiting]
        if not most_agents:
            return totals
        left_out = GaugeMetricFamily(
            "chiffon_agents_without_series",
            "Agents beyond CHIFFON_METRICS_AGENT_LIMIT, which have no series of their own.",
        )
        left_out.add_metric([], max(sum(summary.agents.values()) - len(rows), 0))
        return [*totals, left_out, *_of_agents(rows)]

    return read


def _of_agents(rows: Iterable[AgentRow]) -> Iterator[Metric]:
    info = InfoMetricFamily(
        "chiffon_agent",
        "Who an agent is.",
        labels=["agent_id"],
    )
    is_up = GaugeMetricFamily(
        "chiffon_agent_up",
        "Whether an agent is online or busy and was heard of within its lease.",
        labels=["agent_id"],
    )
    heard = GaugeMetricFamily(
        "chiffon_agent_last_heartbeat_timestamp_seconds",
        "When its last heartbeat was received, on the database's clock.",
        labels=["agent_id"],
    )
    families = {
        name: GaugeMetricFamily(name, text, labels=["agent_id"])
        for name, (text, _) in _READINGS.items()
    }
    for row in rows:
        label = [str(row.agent_id)]
        capacity = describe(row)
        info.add_metric(
            label,
            {
                "hostname": row.hostname or "",
                "pool_name": row.pool_name,
                "agent_type": row.agent_type,
                "agent_version": row.agent_version or "",
                "gpu_type": capacity.gpu_type or "",
            },
        )
        is_up.add_metric(label, not row.is_silent and row.status != "offline")
        if row.last_heartbeat_at is not None:
            heard.add_metric(label, row.last_heartbeat_at.timestamp())
        if row.resource_metrics != {}:
            for name, (_, value) in _READINGS.items():
                number = value(capacity)
                if number is not None:
                    families[name].add_metric(label, number)
    yield from (info, is_up, heard, *families.values())


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else gigabytes * _GIB


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


_READINGS: dict[str, tuple[str, Callable[[AgentCapacity], float | None]]] = {
    "chiffon_agent_cpu_busy_ratio": (
        "Busy share of an agent's CPUs, 0 to 1.",
        lambda one: _ratio(one.cpu_percent),
    ),
    "chiffon_agent_cpu_cores_physical": (
        "Physical cores of an agent's host.",
        lambda one: one.cpu_cores_physical,
    ),
    "chiffon_agent_cpu_cores_available": (
        "Whole cores that are free for a new job.",
        lambda one: one.cpu_cores_available,
    ),
    "chiffon_agent_memory_available_bytes": (
        "Memory that is free for a new job.",
        lambda one: _bytes(one.memory_available_gb),
    ),
    "chiffon_agent_gpu_vram_available_bytes": (
        "VRAM that is free, over all GPUs.",
        lambda one: _bytes(one.gpu_vram_available_gb),
    ),
    "chiffon_agent_gpu_vram_max_available_bytes": (
        "VRAM that is free on the GPU that has most of it.",
        lambda one: _bytes(one.gpu_vram_max_available_gb),
    ),
    "chiffon_agent_gpu_vram_total_bytes": (
        "VRAM, over all GPUs.",
        lambda one: _bytes(one.gpu_vram_total_gb),
    ),
}
