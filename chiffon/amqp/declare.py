"""Putting the topology on a broker, and checking that what is there is what we need."""

import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Literal

from pamqp.common import FieldTable

from chiffon.amqp.connection import Channel, Connection
from chiffon.amqp.publisher import Properties, publish
from chiffon.amqp.translation import translated
from chiffon.contract.messages import CANARY
from chiffon.contract.topology import ONE_QUEUE, Binding, Exchange, Queue, Topology
from chiffon.errors import (
    BusRefused,
    BusUnavailable,
    QueueDown,
    TopologyMismatch,
    TopologyMissing,
    Unroutable,
)

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
ONE_NODE_SECONDS = 2.0
"""For a queue that is on one node of a cluster: without it there is another way."""

Verdict = Literal["ok", "missing", "different", "not allowed"]


@dataclass(frozen=True)
class Finding:
    """What ``check`` found of one object of the topology.

    Args:
        kind: ``exchange``, ``queue`` or ``binding``.
        name: The object's name; for a binding, where from and where to.
        verdict: ``not allowed`` means that this user may not look.
        detail: One line for people; empty when all is well.
    """

    kind: str
    name: str
    verdict: Verdict
    detail: str = ""


Dial = Callable[[], Awaitable[Connection]]


async def declare(
    connection: Connection, wanted: Topology = ONE_QUEUE, without: Collection[str] = ()
) -> None:
    """Declare every exchange, queue and binding; a no-op where they are there already.

    Args:
        connection: The connection; it is lost when the broker says no.
        wanted: What to declare.
        without: Queues to leave out, with what is bound to them.

    Raises:
        BusRefused: This user may not declare.
        QueueDown: A queue is on a node that is down.
        TopologyMismatch: There, with other arguments; the message names object and argument.
        TopologyMissing: The broker lacks the plugin for shards.
        BusUnavailable: The connection broke.
    """
    channel = await connection.channel()
    try:
        for exchange in wanted.exchanges:
            await declare_exchange(channel, exchange)
        for queue in wanted.queues:
            if queue.name not in without:
                await declare_queue(channel, queue)
        for binding in wanted.bindings:
            if binding.to not in without:
                await bind(channel, binding)
        await connection.discard(channel)
    except TopologyMismatch as error:
        raise TopologyMismatch(
            f"{error}. What is there has other arguments: delete it on the broker (it is declared "
            "again at the next start), or see what differs with `chiffon bus check`"
        ) from None


async def await_exchange(connection: Connection, name: str) -> None:
    """Check that an exchange is there, without declaring it.

    Raises:
        TopologyMissing: It is not, which mends itself when an orchestrator first starts.
    """
    try:
        channel = await connection.channel()
        with translated(f"looking for exchange {name}"):
            await channel.exchange_declare(name, passive=True, timeout=ANSWER_SECONDS)
        await connection.discard(channel)
    except TopologyMissing:
        raise TopologyMissing(
            f"exchange {name} is not there yet: start an orchestrator, or run `chiffon bus declare`"
        ) from None


async def declare_queue(channel: Channel, queue: Queue) -> None:
    """Declare one durable queue.

    Raises:
        TopologyMismatch: It is there with other arguments.
        QueueDown: It is there, on a node that is down or does not answer.
        BusRefused: No right to.
    """
    is_on_one_node = queue.arguments.get("x-queue-type") == "classic"
    try:
        with translated(f"declaring queue {queue.name}"):
            try:
                await channel.queue_declare(
                    queue.name,
                    durable=True,
                    auto_delete=queue.auto_delete,
                    arguments=queue.arguments,
                    timeout=ONE_NODE_SECONDS if is_on_one_node else ANSWER_SECONDS,
                )
            except TimeoutError:
                raise QueueDown(queue.name) from None  # RabbitMQ 4.0 looks for it for a minute
    except TopologyMissing:
        # To a declaration that is not passive this is the only meaning of "not found".
        raise QueueDown(queue.name) from None


async def bind(channel: Channel, binding: Binding) -> None:
    """Declare one binding; twice is the same as once.

    Raises:
        BusRefused: No right to.
    """
    put = channel.exchange_bind if binding.to_exchange else channel.queue_bind
    with translated(f"binding {binding.to} to {binding.exchange}"):
        await put(
            binding.to,
            binding.exchange,
            routing_key=binding.routing_key,
            arguments=binding.arguments,
            timeout=ANSWER_SECONDS,
        )


async def declare_exchange(channel: Channel, exchange: Exchange) -> None:
    """Declare one durable exchange.

    Raises:
        TopologyMissing: The broker lacks the plugin that brings its type.
        TopologyMismatch: It is there with another type.
        BusRefused: No right to.
    """
    try:
        with translated(f"declaring exchange {exchange.name}"):
            await channel.exchange_declare(
                exchange.name,
                exchange_type=exchange.kind,
                durable=True,
                timeout=ANSWER_SECONDS,
            )
    except BusUnavailable as error:
        if "unknown exchange type" not in str(error):
            raise
        raise TopologyMissing(
            f"the broker has no exchanges of type {exchange.kind}; on each of its nodes run: "
            "rabbitmq-plugins enable rabbitmq_consistent_hash_exchange"
        ) from None


async def ensure(
    dial: Dial, wanted: Topology = ONE_QUEUE, needed: Collection[str] | None = None
) -> None:
    """Declare the topology, or where that is not allowed, make sure that it is there.

    A queue on nodes that are down is done without, if it is not needed.

    Args:
        dial: Opens a connection; each refusal of the broker costs one.
        wanted: What is to be there.
        needed: The queues that there is no doing without; default those of heartbeats.

    Raises:
        TopologyMissing: Not there, and we may not declare it; the message lists what.
        TopologyMismatch: There, with other arguments.
        QueueDown: A queue that is needed is on nodes that are down.
        BusUnavailable: The broker cannot be reached.
    """
    down: set[str] = set()
    while True:
        connection = await dial()
        try:
            await declare(connection, wanted, without=down)
            return
        except QueueDown as error:
            if error.queue in (wanted.ingest if needed is None else needed):
                raise
            log.warning("%s: going on without it", error)
            down.add(error.queue)
        except BusRefused as error:
            log.info("may not declare the topology (%s); checking that it is there", error)
            break
        finally:
            await connection.close()
    absent = [finding.name for finding in await check(dial, wanted) if finding.verdict == "missing"]
    if absent:
        raise TopologyMissing(
            f"missing on the broker, and this user may not declare: {', '.join(absent)}. "
            "Run `chiffon bus declare` as a user who may"
        )


async def check(dial: Dial, wanted: Topology = ONE_QUEUE) -> list[Finding]:
    """Compare what is on the broker with the topology, and change nothing.

    A passive declaration shows whether an object is there, one with our arguments whether it is
    the same (it would be refused). AMQP cannot list bindings, so each is asked to route a message
    that lives 0 ms; it is gone when it arrives, or at most is looked at and ignored. That a shard
    is not bound to the hash cannot be seen so: the others take its share.

    Args:
        dial: Opens a connection; the broker closes the channel at each "no", so each object
            that is not as it should be costs one more.
        wanted: What is to be there.

    Returns:
        One finding an object, in the order of the topology.

    Raises:
        BusUnavailable: The broker cannot be reached.
    """
    findings: list[Finding] = []
    every: list[Exchange | Queue | Binding] = [
        *wanted.exchanges,
        *wanted.queues,
        *wanted.bindings,
    ]
    connection = await dial()
    try:
        for one in every:
            if connection.lost.done():
                await connection.close()
                connection = await dial()
            findings.append(await _check(connection, one))
    finally:
        await connection.close()
    return findings


async def _check(connection: Connection, wanted: Exchange | Queue | Binding) -> Finding:
    kind = type(wanted).__name__.lower()
    name = _named(wanted) if isinstance(wanted, Binding) else wanted.name
    try:
        channel = await connection.channel()
        match wanted:
            case Exchange():
                with translated(f"looking for exchange {name}"):
                    await channel.exchange_declare(name, passive=True, timeout=ANSWER_SECONDS)
                await declare_exchange(channel, wanted)
            case Queue():
                with translated(f"looking for queue {name}"):
                    await channel.queue_declare(name, passive=True, timeout=ANSWER_SECONDS)
                await declare_queue(channel, wanted)
            case Binding():
                await _route_through(channel, wanted)
    except Unroutable:
        return Finding(kind, name, "missing", "run `chiffon bus declare`")
    except TopologyMissing:
        connection.drop("an object is missing")
        return Finding(kind, name, "missing", "run `chiffon bus declare`")
    except TopologyMismatch as error:
        connection.drop("an object differs")
        return Finding(kind, name, "different", str(error))
    except BusRefused as error:
        connection.drop("no permission")
        return Finding(kind, name, "not allowed", str(error))
    return Finding(kind, name, "ok")


async def _route_through(channel: Channel, binding: Binding) -> None:
    headers: FieldTable = {k: v for k, v in binding.arguments.items() if k != "x-match"}
    await publish(
        channel,
        b"{}",
        exchange=binding.exchange,
        routing_key=binding.routing_key.replace("#", "chiffon.canary.check"),
        # A canary, so that an ingest which takes it before it is gone knows what it is.
        properties=Properties(message_type=CANARY, expiration="0", headers=headers),
        timeout=ANSWER_SECONDS,
    )


def _named(binding: Binding) -> str:
    terms = binding.routing_key or ", ".join(
        f"{key}={value}" for key, value in binding.arguments.items() if key != "x-match"
    )
    return f"{binding.exchange} -> {binding.to} ({terms})"
