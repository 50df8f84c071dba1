"""What Prometheus reads of this process: what it did, and how its connections are.

Counters stand beside the code that counts. Names and units follow Prometheus's own practices:
base units with their suffix, ``_total``, ``_info``, ``_timestamp_seconds``.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from chiffon.amqp.reconnecting import ReconnectingConnection

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets for what takes time."""

Read = Callable[[], Awaitable[Iterable[Metric]]]


async def page(*reads: Read) -> bytes:
    """Return this process's metrics, and what ``reads`` find now, as Prometheus reads them."""
    found: list[Metric] = []
    for read in reads:
        found += await read()
    return await asyncio.to_thread(_generate, found)


def _generate(found: list[Metric]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Given(found))
    return generate_latest(REGISTRY) + generate_latest(registry)


class _Given(Collector):
    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        return self._found


def connections(supervised: Mapping[str, ReconnectingConnection[Any]]) -> Read:
    """Return how often connections were made, by what each is for."""

    async def read() -> list[Metric]:
        made = CounterMetricFamily(
            "chiffon_connections_made",
            "Connections to the broker that were made; each but the first is a reconnect.",
            labels=["use"],
        )
        is_up = GaugeMetricFamily(
            "chiffon_connection_up", "Whether it is connected to the broker.", labels=["use"]
        )
        for use, one in supervised.items():
            made.add_metric([use], one.connections_made)
            is_up.add_metric([use], one.current is not None)
        return [made, is_up]

    return read
