"""Every exchange, queue and binding chiffon uses, as data, and nothing else.

``amqp.declare`` declares and checks what stands here; ``definitions`` writes the same as a RabbitMQ
definitions file. Arguments are structure: a queue keeps those it was declared with, and a
declaration with others is refused (406). What an operator may want to tune belongs in a policy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

HEARTBEATS = "chiffon.heartbeats"
REPLIES = "chiffon.replies"
EVENTS = "chiffon.events"
RPC = "chiffon.rpc"
DEAD_LETTERS = "chiffon.dead-letters"
"""Name of the exchange and of the queue behind it."""
INGEST = "chiffon.ingest"
"""The queue of heartbeats; of shards, ``chiffon.ingest.1-of-2`` and so on."""
SHARDS = "chiffon.shards"
"""The exchange before them, with their number behind it: ``chiffon.shards.2``."""
CAPACITY = "chiffon.capacity"

CAPACITY_KEY = "capacity"
HEARTBEAT_KEYS = "heartbeat.#"
MOST_SHARDS = 64

DEAD_LETTER_HEADER = "chiffon-dead-letter"
REASON_HEADER = "chiffon-reason"
ORIGIN_EXCHANGE_HEADER = "chiffon-exchange"
ORIGIN_KEY_HEADER = "chiffon-routing-key"
SET_ASIDE_HEADER = "chiffon-set-aside-ms"
"""When, on the clock of who did it: unix milliseconds."""
HELD_HEADER = "chiffon-held-ms"
"""How long a replayed message was set aside: it is that much older."""
DEADLINE_HEADER = "x-deadline"


@dataclass(frozen=True)
class Exchange:
    """A durable exchange."""

    name: str
    kind: str


@dataclass(frozen=True)
class Queue:
    """A durable queue with the arguments it is declared with."""

    name: str
    arguments: dict[str, Any]
    auto_delete: bool = False


@dataclass(frozen=True)
class Binding:
    """A binding from an exchange to a queue, or to another exchange."""

    exchange: str
    to: str
    routing_key: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    to_exchange: bool = False


@dataclass(frozen=True)
class Topology:
    """All that is on the broker. ``ingest`` are the queues of heartbeats, one a shard.

    A canary proves the way to one of them, or through the exchange before them: ``path`` are those
    whose ways have to be proven, so that the fleet can be believed to be heard.
    """

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]
    ingest: tuple[str, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The queues of heartbeats, and the exchange that they share if there are several."""
        return self.ingest if len(self.ingest) == 1 else (self._shared, *self.ingest)

    @property
    def _shared(self) -> str:
        return f"{SHARDS}.{len(self.ingest)}"

    def proven_by(self, routing_key: str, queue: str) -> str | None:
        """Return which of ``path`` a canary proves that came by a queue; ``None`` if none."""
        if len(self.ingest) == 1:
            return queue
        if routing_key.startswith(f"{shard_key(queue)}."):
            return queue
        return self._shared if routing_key.startswith(_CANARY_KEYS) else None

    @classmethod
    def of(cls, shards: int = 1) -> "Topology":
        """Return the topology with so many queues for heartbeats.

        Several stand behind an exchange that hashes the routing key, so that those of an agent
        always come by the same. The exchange shares out alike what is bound with the same weight.
        Another number has nothing in common with it, so that both may be in use for a while, and
        who has proven the path of one hears the whole fleet.

        Args:
            shards: 1 to ``MOST_SHARDS``.
        """
        if shards == 1:
            return cls(_EXCHANGES, (_ingest(INGEST), *_QUEUES), (_TO_INGEST, *_BINDINGS), (INGEST,))
        names = tuple(f"{INGEST}.{number}-of-{shards}" for number in range(1, shards + 1))
        exchange = f"{SHARDS}.{shards}"
        return cls(
            (*_EXCHANGES, Exchange(exchange, "x-consistent-hash")),
            (*map(_ingest, names), *_QUEUES),
            (
                Binding(HEARTBEATS, exchange, HEARTBEAT_KEYS, to_exchange=True),
                *(Binding(exchange, name, "1") for name in names),
                # Around the hash, so that each shard can be proven by a canary of its own.
                *(Binding(HEARTBEATS, name, f"{shard_key(name)}.#") for name in names),
                *_BINDINGS,
            ),
            names,
        )


_EXCHANGES = (
    Exchange(HEARTBEATS, "topic"),
    Exchange(REPLIES, "topic"),
    Exchange(EVENTS, "topic"),
    Exchange(RPC, "direct"),
    Exchange(DEAD_LETTERS, "headers"),
)


def _ingest(name: str) -> Queue:
    return Queue(
        name,
        {
            # Survives the loss of a minority of nodes, and keeps a confirmed farewell on disk.
            "x-queue-type": "quorum",
            # A backlog is bounded; beyond it the oldest go, since the newest heartbeat of an
            # agent says all that the older ones said.
            "x-max-length": 100_000,
            "x-overflow": "drop-head",
            # A message that ends its consumer every time is set aside at last. High, since each
            # loss of a consumer counts one return for every message it had prefetched. Never -1:
            # RabbitMQ 3.10 then drops at the first return, 4.x means unlimited.
            "x-delivery-limit": 100,
            "x-dead-letter-exchange": DEAD_LETTERS,
        },
    )


_QUEUES = (
    Queue(
        DEAD_LETTERS,
        {
            # Explicit, as a virtual host may have another default type.
            "x-queue-type": "classic",
            # A flood of bad messages must not fill the broker's disk.
            "x-max-length": 10_000,
            "x-max-length-bytes": 64 * 1024 * 1024,
            "x-overflow": "drop-head",
        },
    ),
)

_TO_INGEST = Binding(HEARTBEATS, INGEST, HEARTBEAT_KEYS)
_BINDINGS = (
    # A headers exchange with these three bindings takes what was refused, and not the heartbeats
    # that merely expired or overflowed: a plain dead-letter exchange would take every one.
    Binding(
        DEAD_LETTERS,
        DEAD_LETTERS,
        arguments={"x-match": "all-with-x", "x-first-death-reason": "rejected"},
    ),
    Binding(
        DEAD_LETTERS,
        DEAD_LETTERS,
        arguments={"x-match": "all-with-x", "x-first-death-reason": "delivery_limit"},
    ),
    Binding(DEAD_LETTERS, DEAD_LETTERS, arguments={"x-match": "all", DEAD_LETTER_HEADER: "1"}),
)

ONE_QUEUE = Topology.of(1)

# Declared by the responder alone: it lives and dies with whoever answers, so that a question
# nobody would answer is returned to the planner at once.
CAPACITY_QUEUE = Queue(
    CAPACITY,
    {
        # Quorum queues cannot be auto-delete.
        "x-queue-type": "classic",
        # After a crash of the broker a durable auto-delete queue comes back without its consumer
        # and would take questions that nobody answers; it goes after 10 s (milliseconds here).
        "x-expires": 10_000,
    },
    auto_delete=True,
)
CAPACITY_STANDBY_QUEUE = replace(CAPACITY_QUEUE, name=f"{CAPACITY}.standby")
"""Used while ``CAPACITY_QUEUE`` is on a node of a cluster that is down: the broker lets nobody
declare it anew. For as long as both are there a question is answered twice, which harms nobody."""

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to."
_REPLY_KEY = re.compile(r"[A-Za-z0-9_.-]{1,200}")
REPLY_FORMS = ("exclusive-queue", "direct-reply-to", "replies-exchange")


_CANARY_KEYS = "heartbeat.chiffon.canary."


def canary_keys(orchestrator_id: UUID, wanted: Topology, own: Sequence[str]) -> list[str]:
    """Return the routing keys of an orchestrator's canaries.

    The first goes the way of the heartbeats, and so fits ``heartbeat.#``; where there are several
    queues, one for each that it consumes goes there around the hash.
    """
    keys = [f"{_CANARY_KEYS}{orchestrator_id}"]
    if len(wanted.ingest) > 1:
        keys += [f"{shard_key(queue)}.{orchestrator_id}" for queue in own]
    return keys


def shard_key(queue: str) -> str:
    """Return how the routing keys of a shard's own canaries begin; no heartbeat's does."""
    return f"shard.{queue.rpartition('.')[2]}"


def tells_of_delivery(key: str) -> bool:
    """Return whether a mandatory answer to this key comes back only if nobody took it.

    To direct reply-to it comes back although it is delivered (RabbitMQ 3.10 and 4.0): there it
    tells nothing, so an answer is sent without.
    """
    return not key.startswith(DIRECT_REPLY_TO)


def reply_route(reply_to: str | None, allowed: tuple[str, ...] = REPLY_FORMS) -> tuple[str, str]:
    """Return the exchange and routing key for an answer.

    A caller must not be able to make us write into somebody's queue, so only three forms are
    taken: a server-named queue (``amq.gen-``), RabbitMQ's direct reply-to, and a key of our own
    replies exchange, for brokers where nobody may write to the default exchange.

    Args:
        reply_to: The AMQP property as it came.
        allowed: Which of ``REPLY_FORMS`` are taken.

    Raises:
        ValueError: Anything else, or nothing; the message says so.
    """
    if not reply_to:
        raise ValueError("the question has no reply_to")
    if "exclusive-queue" in allowed and reply_to.startswith("amq.gen-"):
        return "", reply_to
    if "direct-reply-to" in allowed and reply_to.startswith(DIRECT_REPLY_TO):
        return "", reply_to
    key = reply_to.removeprefix(f"/exchanges/{REPLIES}/")
    if "replies-exchange" in allowed and key != reply_to and _REPLY_KEY.fullmatch(key):
        return REPLIES, key
    raise ValueError(f"reply_to {reply_to[:64]!r} is not a form that may be written to")


def definitions(vhost: str, shards: int = 1) -> dict[str, Any]:
    """Return the topology as a RabbitMQ definitions document for one virtual host.

    ``chiffon.capacity`` is not in it. Users and permissions are the operator's; a blank node
    that loads definitions at boot creates no default user.
    """
    wanted = Topology.of(shards)
    return {
        "vhosts": [{"name": vhost}],
        "exchanges": [
            {
                "name": exchange.name,
                "vhost": vhost,
                "type": exchange.kind,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for exchange in wanted.exchanges
        ],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": True,
                "auto_delete": queue.auto_delete,
                "arguments": queue.arguments,
            }
            for queue in wanted.queues
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.to,
                "destination_type": "exchange" if binding.to_exchange else "queue",
                "routing_key": binding.routing_key,
                "arguments": binding.arguments,
            }
            for binding in wanted.bindings
        ],
    }
