"""The orchestrator: ingest, sweeper, expiry, canary and responder in one process.

Any number may run on one broker and database; any may die at any time. Its connections: one
consumes heartbeats, one questions, the others publish, since an alarm of the broker stops
everything on a connection that publishes, acknowledgements included; answers have their own.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any
from uuid import uuid4

from chiffon import consumer, fleet_metrics, health, metrics, migrations
from chiffon.bus import Publisher
from chiffon.capacity import OrchestratorService
from chiffon.closings import Closings
from chiffon.consumer import Consumer
from chiffon.dead_letters import DeadLetters
from chiffon.errors import BusUnavailable
from chiffon.events import Events
from chiffon.expiry import Expiry
from chiffon.exposition import Page, exposing
from chiffon.ingest import AT_ONCE, Ingest
from chiffon.link import Link
from chiffon.process import spare_collector, stopped_by
from chiffon.provisioning import ensure
from chiffon.questions import Questions
from chiffon.registry import CONNECTIONS, Registry
from chiffon.reservations import ReservationService
from chiffon.responder import Responder
from chiffon.session import Session, dial_any
from chiffon.settings import Settings, describe
from chiffon.sweeper import Canary, Sweeper
from chiffon.topology import Topology, canary_keys
from chiffon.waiting import WaitingRoom
from chiffon.watchdog import Watchdog

log = logging.getLogger(__name__)

DECLARED_SECONDS = 0.5
DRAIN_SECONDS = 8.0
"""For the last batch to be committed and acknowledged after SIGTERM."""


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; see ``serve``."""
    spare_collector()
    await serve(settings, stopped_by())


async def serve(settings: Settings, stopped: asyncio.Event) -> None:
    """Serve until ``stopped``; then finish the batch at hand, acknowledge it and return.

    Raises:
        BusUnavailable: The broker cannot be reached at the start, or its topology cannot be used.
        RegistryUnavailable: The database cannot be reached at the start, or has older tables.
    """
    amqp_url = settings.amqp_url.get_secret_value()
    orchestrator_id = uuid4()
    name = f"orchestrator {orchestrator_id}"

    wanted = Topology.of(settings.ingest_shards)
    own = wanted.ingest
    if settings.ingest_shard is not None:
        own = (wanted.ingest[settings.ingest_shard - 1],)
    keys = canary_keys(orchestrator_id, wanted, own)
    declaring, declared_at = asyncio.Lock(), -math.inf

    async def declare() -> None:
        nonlocal declared_at
        async with declaring:
            # After a restart of the broker all connections come here at about the same time.
            if time.monotonic() - declared_at > DECLARED_SECONDS:
                await ensure(lambda: dial_any(amqp_url, f"{name} declares"), wanted, own)
                declared_at = time.monotonic()

    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(
            Registry.open(
                settings.database_url.get_secret_value(),
                connections=CONNECTIONS + AT_ONCE * (len(own) - 1),
            )
        )
        await migrations.require_head(registry)
        await declare()  # what cannot be mended ends the process here
        outgoing = await stack.enter_async_context(
            Link(amqp_url, name=f"{name} publishes", prepare=lambda _: declare())
        )
        answers = await stack.enter_async_context(Link(amqp_url, name=f"{name} answers"))
        # Of their own: a queue that is down confirms none, which ends their connection each time.
        canaries = await stack.enter_async_context(Link(amqp_url, name=f"{name} proves"))
        dead_letters = DeadLetters(outgoing)
        # Of their own: where an answer goes is the asker's word, and it is sent again and again.
        late_answers = await stack.enter_async_context(Link(amqp_url, name=f"{name} calls back"))
        reservations = ReservationService(registry)
        waiting = WaitingRoom(registry, Publisher(late_answers))
        events = Events(outgoing)
        ingests = [
            Ingest(
                registry,
                events,
                dead_letters,
                canary_keys=keys,
                queue=queue,
                wanted=wanted,
                batch_size=settings.ingest_batch_size,
                batch_seconds=settings.ingest_batch_seconds,
            )
            for queue in own
        ]
        responder = Responder(
            Questions(OrchestratorService(registry), reservations, waiting),
            reservations,
            answers,
            Publisher(answers),
            dead_letters,
            reply_forms=settings.reply_forms,
        )

        async def answer(session: Session) -> None:
            await declare()  # again: the broker may have come back empty
            await responder.attach(session)

        async def consume(ingest: Ingest, to: Consumer) -> None:
            await declare()
            await ingest.attach(to)

        questions = await stack.enter_async_context(
            Link(amqp_url, name=f"{name} listens", prepare=answer)
        )
        links: dict[str, Link[Any]] = {"publish": outgoing, "listen": questions, "answer": answers}
        for ingest in ingests:
            use = "consume" if len(wanted.ingest) == 1 else f"consume {ingest.queue}"
            links[use] = await stack.enter_async_context(
                Link(
                    amqp_url,
                    name=f"{name} consumes {ingest.queue}",
                    prepare=partial(consume, ingest),
                    dial=consumer.dial,
                )
            )
        if settings.metrics_port is not None:
            pages = _pages(registry, ingests, links)
            port = await stack.enter_async_context(
                exposing(settings.metrics_host, settings.metrics_port, pages)
            )
            log.info("metrics and health on %s:%d", settings.metrics_host, port)
        broker, database = describe(settings.amqp_url), describe(settings.database_url)
        log.info("orchestrator %s: broker %s, database %s", orchestrator_id, broker, database)
        closings = Closings(amqp_url, f"{name} watches connections")
        sweeper = Sweeper(
            registry,
            events,
            closings,
            interval_seconds=settings.sweep_interval_seconds,
            outage_share=settings.outage_share,
            outage_hold_seconds=settings.outage_hold_seconds,
        )
        expiry = Expiry(
            registry,
            events,
            interval_seconds=settings.sweep_interval_seconds,
            offline_seconds=settings.reservation_offline_seconds,
        )
        others = {
            "sweeper": sweeper.run(),
            "expiry": expiry.run(),
            "waiting": waiting.run(),
            "canary": Canary(canaries, keys).run(),
            "events": events.run(),
            "closings": closings.run(),
            **{f"watchdog of {one.queue}": Watchdog(one, outgoing).run() for one in ingests},
            "responder": responder.run(lambda: dial_any(amqp_url, f"{name} looks")),
        }
        await _run_parts(ingests, responder, others, stopped)
    log.info("orchestrator %s stopped", orchestrator_id)


def _pages(
    registry: Registry, ingests: Sequence[Ingest], links: Mapping[str, Link[Any]]
) -> dict[str, Callable[[bool], Awaitable[Page]]]:
    async def consumes() -> None:
        for one in ingests:
            if not one.is_attached:
                raise BusUnavailable(f"heartbeats are not consumed from {one.queue}")

    checks = {
        "broker": health.connected(links["publish"]),
        "consumer": consumes,
        "questions": health.connected(links["listen"]),
        **migrations.checks(registry),
    }

    async def exposed(_: bool) -> Page:
        body = await metrics.page(metrics.connections(links), fleet_metrics.fleet(registry))
        return Page(body, content_type=metrics.CONTENT_TYPE)

    return {
        "/livez": health.livez,
        "/readyz": lambda verbose: health.readyz(checks, verbose),
        "/metrics": exposed,
    }


async def _run_parts(
    ingests: Sequence[Ingest],
    responder: Responder,
    others: Mapping[str, Coroutine[Any, Any, None]],
    stopped: asyncio.Event,
) -> None:
    """Run the parts until ``stopped``, or until one of them ends, which is raised."""
    recording = {asyncio.create_task(one.run(), name=one.queue) for one in ingests}
    parts: set[asyncio.Future[Any]] = {
        *recording,
        *(asyncio.create_task(part, name=name) for name, part in others.items()),
    }
    stopping: asyncio.Future[Any] = asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({stopping, *parts}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.is_set():
            await asyncio.gather(responder.stop(), *(one.stop() for one in ingests))
            await asyncio.wait(recording, timeout=DRAIN_SECONDS)
    finally:
        ended = [part for part in parts if part.done()]
        for task in (stopping, *parts):
            task.cancel()
        await asyncio.wait({stopping, *parts})
    for part in ended:
        part.result()
