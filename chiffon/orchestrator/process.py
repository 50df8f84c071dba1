"""The orchestrator: ingest, sweeper, expiry, wait queue and responder in one process.

Any number may run on one broker and database; any may die at any time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from uuid import uuid4

from chiffon.amqp import consumer, properties
from chiffon.amqp.connection import Connection, dial_any
from chiffon.amqp.consumer import Consumer
from chiffon.amqp.dead_letters import DeadLetters
from chiffon.amqp.publisher import Publisher
from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.lease import CANARY_INTERVAL_SECONDS
from chiffon.contract.topology import Topology, canary_keys
from chiffon.errors import BusUnavailable
from chiffon.logs import Trouble
from chiffon.observability import fleet_metrics, health, metrics
from chiffon.observability.http import Page, exposing
from chiffon.orchestrator.canary import Canary
from chiffon.orchestrator.connection_events import ConnectionEvents
from chiffon.orchestrator.connections import Connections
from chiffon.orchestrator.events import Events
from chiffon.orchestrator.expiry import Expiry
from chiffon.orchestrator.forgetting import LOOK_SECONDS as FORGET_SECONDS
from chiffon.orchestrator.forgetting import Forgetting
from chiffon.orchestrator.ingest import COMMITTING, Ingest
from chiffon.orchestrator.periodic import every
from chiffon.orchestrator.requests import Requests
from chiffon.orchestrator.responder import Responder
from chiffon.orchestrator.sweeper import Sweeper
from chiffon.orchestrator.upkeep import LOOK_SECONDS, Upkeep
from chiffon.orchestrator.wait_queue import PASS_SECONDS, WaitQueueServer
from chiffon.orchestrator.watchdog import Watchdog
from chiffon.process import patiently, spare_collector, stopped_by
from chiffon.registry import migrations
from chiffon.registry.registry import CONNECTIONS, Registry
from chiffon.settings import Settings, describe

log = logging.getLogger(__name__)

DRAIN_SECONDS = 8.0
"""For the last batch to be committed and acknowledged after SIGTERM."""


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; see ``serve``."""
    spare_collector()
    await serve(settings, stopped_by())


async def serve(settings: Settings, stopped: asyncio.Event) -> None:
    """Serve until ``stopped``; then finish the batch at hand, acknowledge it and return.

    Broker, database and tables are waited for.

    Raises:
        BadConfiguration: A setting that cannot work.
        ConsumerStuck: The broker gives our consumer nothing, whatever we do.
    """
    properties.install()
    async with AsyncExitStack() as stack:
        orchestrator = Orchestrator(settings, stack)
        log.info(
            "%s: broker %s, database %s",
            orchestrator.name,
            describe(settings.amqp_url),
            describe(settings.database_url),
        )
        await orchestrator.wait(stopped)
        if not stopped.is_set():
            await orchestrator.open()
            await orchestrator.run(stopped)
    log.info("%s stopped", orchestrator.name)


class Orchestrator:
    """The parts of one orchestrator, and how they are wired.

    Args:
        settings: Of the process.
        stack: Closes what is opened.
    """

    def __init__(self, settings: Settings, stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._url = settings.amqp_url.get_secret_value()
        self._id = uuid4()
        self.name = f"orchestrator {self._id}"
        self._topology = Topology.of(settings.ingest_shards)
        self._queues = self._topology.ingest
        if settings.ingest_shard is not None:
            self._queues = (self._topology.ingest[settings.ingest_shard - 1],)
        self._connections = Connections(self._url, self.name, stack)
        self._upkeep = Upkeep(partial(self._dial, "declares"), self._topology, self._queues)
        self._checks: dict[str, Callable[[], Awaitable[None]]] = {}
        self._waits_for = Trouble()

    async def wait(self, stopped: asyncio.Event) -> None:
        """Open the registry, and wait until tables and topology are there, or we are stopped."""
        settings = self._settings
        self._registry = await self._stack.enter_async_context(
            Registry.open(
                settings.database_url.get_secret_value(),
                connections=CONNECTIONS + COMMITTING * (len(self._queues) - 1),
            )
        )
        self._checks = {"start": self._require_started, **migrations.checks(self._registry)}
        if settings.metrics_port is not None:
            port = await self._stack.enter_async_context(
                exposing(settings.metrics_host, settings.metrics_port, self._pages())
            )
            log.info("metrics and health on %s:%d", settings.metrics_host, port)
        for needed in (partial(migrations.require_head, self._registry), self._upkeep.ensure):
            await patiently(needed, stopped, trouble="not started yet", lasting=self._waits_for)

    async def open(self) -> None:
        """Open all connections, and make the parts."""
        settings, connect, declared = self._settings, self._connections.open, self._upkeep.ensure
        publishes = await connect("publishes", prepare=declared)
        dead_letters = DeadLetters(publishes, partial(declared, is_missed=True))
        self._events = Events(publishes)
        answers = await connect("answers", prepare=declared)
        self._keys = canary_keys(self._id, self._topology, self._queues)
        self._canary = Canary(await connect("sends canaries", prepare=declared), self._keys)
        self._declares = await connect("declares")

        capacity = OrchestratorService(self._registry)
        reservations = ReservationService(self._registry)
        self._wait_queue = WaitQueueServer(
            self._registry, capacity, Publisher(await connect("answers who waited"))
        )
        self._responder = Responder(
            Requests(capacity, reservations, self._wait_queue),
            reservations,
            answers,
            Publisher(answers),
            dead_letters,
            reply_forms=settings.reply_forms,
        )
        await connect("consumes requests", prepare=self._respond)
        self._ingests = [self._ingest(queue, dead_letters) for queue in self._queues]
        for ingest in self._ingests:
            await connect(
                f"consumes {ingest.queue}",
                prepare=partial(self._consume, ingest),
                dial=consumer.dial,
            )
        self._watchdogs = [Watchdog(ingest, publishes) for ingest in self._ingests]
        self._connection_events = ConnectionEvents(
            self._url, f"{self.name} follows connections", self._registry
        )
        self._sweeper = Sweeper(
            self._registry,
            self._events,
            outage_share=settings.outage_share,
            outage_hold_seconds=settings.outage_hold_seconds,
        )
        self._expiry = Expiry(
            reservations, self._events, offline_seconds=settings.reservation_offline_seconds
        )
        self._forgetting = Forgetting(self._registry.agents, settings.forget_offline_after_seconds)
        connections = self._connections.by_use
        self._checks = {
            "broker": health.connected(connections["publishes"]),
            "consumer": partial(_require_consuming, self._ingests),
            "questions": partial(_require_answering, self._responder),
            **migrations.checks(self._registry),
        }

    async def run(self, stopped: asyncio.Event) -> None:
        """Run the parts until ``stopped``, or until one of them ends, which is raised."""
        recording = {asyncio.create_task(one.run(), name=one.queue) for one in self._ingests}
        parts: set[asyncio.Future[Any]] = {
            *recording,
            *(asyncio.create_task(work, name=name) for name, work in self._work().items()),
        }
        stopping: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
        try:
            await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.is_set():
                await asyncio.gather(self._responder.stop(), *(one.stop() for one in self._ingests))
                await asyncio.wait(recording, timeout=DRAIN_SECONDS)
        finally:
            ended = [part for part in parts if part.done()]
            for task in (stopping, *parts):
                task.cancel()
            await asyncio.wait({stopping, *parts})
        for part in ended:
            part.result()

    def _work(self) -> Mapping[str, Coroutine[Any, Any, None]]:
        """Return all that is done beside ingest, by name."""
        sweep_seconds = self._settings.sweep_interval_seconds
        wait_queue, followed = self._wait_queue, self._connection_events
        return {
            "sweep": every(sweep_seconds, self._sweeper.sweep, trouble="no sweep"),
            "expiry": every(sweep_seconds, self._expiry.end_due, trouble="no reservation is ended"),
            "wait queue": every(
                PASS_SECONDS,
                wait_queue.serve,
                trouble="those who wait are not answered",
                wake=wait_queue.joined,
            ),
            "forgetting": every(
                FORGET_SECONDS, self._forgetting.forget, trouble="nobody is forgotten"
            ),
            "upkeep": every(LOOK_SECONDS, self._keep_up, trouble="what is gone stays gone"),
            "canary": every(CANARY_INTERVAL_SECONDS, self._canary.publish, trouble="no canary"),
            "events": self._events.run(),
            "connection events": followed.run(),
            "hide": every(
                sweep_seconds,
                followed.hide,
                trouble="agents whose connection closed are still offered",
                wake=followed.due,
            ),
            "responder": self._responder.run(lambda: self._dial("looks for its queue")),
            **{f"watchdog of {one.queue}": one.run() for one in self._watchdogs},
        }

    def _ingest(self, queue: str, dead_letters: DeadLetters) -> Ingest:
        return Ingest(
            self._registry,
            self._events,
            dead_letters,
            canary_keys=self._keys,
            queue=queue,
            wanted=self._topology,
            batch_size=self._settings.ingest_batch_size,
            batch_seconds=self._settings.ingest_batch_seconds,
        )

    async def _respond(self, connection: Connection) -> None:
        await self._upkeep.ensure()  # again: the broker may have come back empty
        await self._responder.attach(connection)

    async def _consume(self, ingest: Ingest, connection: Consumer) -> None:
        await self._upkeep.ensure()
        await ingest.attach(connection)

    async def _keep_up(self) -> None:
        await self._upkeep.look(self._declares)
        await self._responder.bind()

    async def _require_started(self) -> None:
        raise BusUnavailable(f"waiting: {self._waits_for.said or 'it has just begun'}")

    async def _dial(self, use: str) -> Connection:
        return await dial_any(self._url, f"{self.name} {use}")

    def _pages(self) -> dict[str, Callable[[bool], Awaitable[Page]]]:
        async def exposed(_: bool) -> Page:
            reads = (
                metrics.connections(self._connections.by_use),
                fleet_metrics.fleet(self._registry),
            )
            return Page(await metrics.page(*reads), content_type=metrics.CONTENT_TYPE)

        return {
            "/livez": health.livez,
            "/readyz": lambda verbose: health.readyz(self._checks, verbose),
            "/metrics": exposed,
        }


async def _require_answering(responder: Responder) -> None:
    if not responder.is_attached:
        raise BusUnavailable("capacity questions are not answered here")


async def _require_consuming(ingests: Sequence[Ingest]) -> None:
    for one in ingests:
        if not one.is_attached:
            raise BusUnavailable(f"heartbeats are not consumed from {one.queue}")
