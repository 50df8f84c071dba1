"""Taking queues of heartbeats out of use, when their number was changed, and losing nothing.

The queues of the new number are bound first, by the orchestrators that consume them, so that from
then on every heartbeat also goes there. Then those that are left over are unbound, whoever still
consumes them empties them, and they are deleted. What went both ways is recorded once: its order
is in the data.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from chiffon.errors import TopologyMissing
from chiffon.provisioning import ANSWER_SECONDS, Dial, declare
from chiffon.session import Channel, Session, translated
from chiffon.topology import Binding, Topology

LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Left:
    """A queue that is not deleted yet: messages that wait in it, and who consumes it."""

    queue: str
    messages: int
    consumers: int


Told = Callable[[list[Left]], None]


async def retire(dial: Dial, old: Topology, new: Topology) -> list[Left]:
    """Unbind what only ``old`` has, and delete what is empty of it and that nobody consumes.

    Called again and again until nothing is left: orchestrators that still consume such a queue
    empty it, and have to be stopped then.

    Args:
        dial: Opens a connection.
        old: The topology that was used until now.
        new: The topology that is used from now on.

    Returns:
        What is left.

    Raises:
        TopologyMissing: The new queues are not consumed, so nobody would get the heartbeats.
        BusRefused: This user may not declare, unbind or delete.
        BusUnavailable: The broker cannot be reached.
    """
    await _require_consumers(dial, new)
    queues = [name for name in old.ingest if name not in new.ingest]
    exchanges = {one.name for one in old.exchanges} - {one.name for one in new.exchanges}
    left: list[Left] = []
    session = await dial()
    try:
        # AMQP cannot tell which bindings there are, so they are made once more before others go.
        await declare(session, new)
        channel = await session.channel(confirms=False)
        for binding in old.bindings:
            if binding not in new.bindings and binding.to in {*queues, *exchanges}:
                await _unbind(channel, binding)
        for queue in queues:
            there = await _look(dial, queue)
            if there is None:
                continue
            if there.messages or there.consumers:
                left.append(there)
            else:
                await _delete_queue(channel, queue)
        for exchange in exchanges if not left else ():
            with translated(f"deleting exchange {exchange}"):
                await channel.exchange_delete(exchange, timeout=ANSWER_SECONDS)
    finally:
        await session.close()
    return left


async def _require_consumers(dial: Dial, new: Topology) -> None:
    for name in new.ingest:
        found = await _look(dial, name)
        if found is None or not found.consumers:
            raise TopologyMissing(
                f"nobody consumes {name}. First start orchestrators with the new "
                "CHIFFON_INGEST_SHARDS: heartbeats go to their queues from then on"
            )


async def _unbind(channel: Channel, binding: Binding) -> None:
    unbind = channel.exchange_unbind if binding.to_exchange else channel.queue_unbind
    with translated(f"unbinding {binding.to}"):
        await unbind(
            binding.to,
            binding.exchange,
            routing_key=binding.routing_key,
            arguments=binding.arguments,
        )


async def _look(dial: Dial, queue: str) -> Left | None:
    """Return what is in a queue; ``None`` if there is no such queue."""
    session: Session = await dial()
    try:
        channel = await session.channel(confirms=False)
        with translated(f"looking at {queue}"):
            answer = await channel.queue_declare(queue, passive=True, timeout=ANSWER_SECONDS)
    except TopologyMissing:
        return None
    finally:
        await session.close()
    return Left(queue, answer.message_count or 0, answer.consumer_count or 0)


async def _delete_queue(channel: Channel, queue: str) -> None:
    # Quorum queues do not know "if empty" and "if unused", so that was looked at before.
    with translated(f"deleting {queue}"):
        await channel.queue_delete(queue, timeout=ANSWER_SECONDS)


async def retire_all(dial: Dial, old: Topology, new: Topology, told: Told) -> None:
    """Call ``retire`` until nothing is left, and say what it waits for whenever that changes.

    Raises:
        See ``retire``.
    """
    before: list[Left] = []
    while left := await retire(dial, old, new):
        if left != before:
            told(left)
        before = left
        await asyncio.sleep(LOOK_SECONDS)
