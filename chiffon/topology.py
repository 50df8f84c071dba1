"""Every exchange, queue and binding chiffon uses, as data, and nothing else.

``bus`` declares and checks what stands here; ``definitions`` writes the same as a RabbitMQ
definitions file. Arguments are structure: a queue keeps those it was declared with, and a
declaration with others is refused (406). What an operator may want to tune belongs in a policy.
"""

import re
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
CAPACITY = "chiffon.capacity"

CAPACITY_KEY = "capacity"
HEARTBEAT_KEYS = "heartbeat.#"

DEAD_LETTER_HEADER = "chiffon-dead-letter"
REASON_HEADER = "chiffon-reason"
ORIGIN_EXCHANGE_HEADER = "chiffon-exchange"
ORIGIN_KEY_HEADER = "chiffon-routing-key"
SET_ASIDE_HEADER = "chiffon-set-aside-ms"
"""When, on the clock of who did it: unix milliseconds."""
HELD_HEADER = "chiffon-held-ms"
"""How long a message was held on its way, by a relay or set aside: it is that much older."""
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
    """A binding from an exchange to a queue."""

    exchange: str
    queue: str
    routing_key: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


EXCHANGES = (
    Exchange(HEARTBEATS, "topic"),
    Exchange(REPLIES, "topic"),
    Exchange(EVENTS, "topic"),
    Exchange(RPC, "direct"),
    Exchange(DEAD_LETTERS, "headers"),
)

QUEUES = (
    Queue(
        INGEST,
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
    ),
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

BINDINGS = (
    Binding(HEARTBEATS, INGEST, HEARTBEAT_KEYS),
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

_REPLY_KEY = re.compile(r"[A-Za-z0-9_.-]{1,200}")
REPLY_FORMS = ("exclusive-queue", "direct-reply-to", "replies-exchange")


def canary_key(orchestrator_id: UUID) -> str:
    """Return the routing key of an orchestrator's canary; it fits ``heartbeat.#``."""
    return f"heartbeat.chiffon.canary.{orchestrator_id}"


def relay_key(pool_name: str, relay_name: str) -> str:
    """Return the routing key of a relay's arrays; it binds nothing in them."""
    return f"heartbeat.{pool_name}.relay.{relay_name}"


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
    if "direct-reply-to" in allowed and reply_to.startswith("amq.rabbitmq.reply-to."):
        return "", reply_to
    key = reply_to.removeprefix(f"/exchanges/{REPLIES}/")
    if "replies-exchange" in allowed and key != reply_to and _REPLY_KEY.fullmatch(key):
        return REPLIES, key
    raise ValueError(f"reply_to {reply_to[:64]!r} is not a form that may be written to")


def definitions(vhost: str) -> dict[str, Any]:
    """Return the topology as a RabbitMQ definitions document for one virtual host.

    ``chiffon.capacity`` is not in it. Users and permissions are the operator's; a blank node
    that loads definitions at boot creates no default user.
    """
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
            for exchange in EXCHANGES
        ],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": True,
                "auto_delete": queue.auto_delete,
                "arguments": queue.arguments,
            }
            for queue in QUEUES
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.routing_key,
                "arguments": binding.arguments,
            }
            for binding in BINDINGS
        ],
    }
