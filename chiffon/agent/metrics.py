"""What an agent reports of itself to Prometheus and Kubernetes."""

import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.errors import BusUnavailable
from chiffon.observability import health, metrics
from chiffon.observability.http import Page


class Beating(Protocol):
    """What is read of an agent; see ``BaseAgent``."""

    @property
    def supervised(self) -> ReconnectingConnection:
        """The connection to the broker."""
        ...

    @property
    def lease_seconds(self) -> float:
        """For how long one of its heartbeats counts."""
        ...

    @property
    def heartbeats_confirmed(self) -> int:
        """How many heartbeats the broker has confirmed."""
        ...

    @property
    def confirmed_seconds_ago(self) -> float:
        """Seconds since the last one; infinite before the first."""
        ...


def pages(agent: Beating) -> dict[str, Callable[[bool], Awaitable[Page]]]:
    """Return the pages ``/livez``, ``/readyz`` and ``/metrics`` of an agent.

    It is ready while a heartbeat was confirmed within its lease.
    """

    async def is_heard() -> None:
        seconds = agent.confirmed_seconds_ago
        if seconds > agent.lease_seconds:
            raise BusUnavailable(f"no heartbeat was confirmed within {agent.lease_seconds:g} s")

    checks = {"broker": health.connected(agent.supervised), "heartbeats": is_heard}

    async def read() -> list[Metric]:
        confirmed = CounterMetricFamily(
            "chiffon_agent_heartbeats_confirmed", "Heartbeats that the broker has confirmed."
        )
        confirmed.add_metric([], agent.heartbeats_confirmed)
        last = GaugeMetricFamily(
            "chiffon_agent_last_confirm_timestamp_seconds",
            "When the last one was confirmed, on this host's clock.",
        )
        if agent.heartbeats_confirmed:
            last.add_metric([], time.time() - agent.confirmed_seconds_ago)
        return [confirmed, last]

    async def exposed(_: bool) -> Page:
        body = await metrics.page(metrics.connections({"heartbeats": agent.supervised}), read)
        return Page(body, content_type=metrics.CONTENT_TYPE)

    return {
        "/livez": health.livez,
        "/readyz": lambda verbose: health.readyz(checks, verbose),
        "/metrics": exposed,
    }
