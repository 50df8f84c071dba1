"""The tables as SQLModel has them; ``migrations`` creates them, ``registry`` speaks SQL to them.

``resource_metrics`` holds what the probes read, with the wire contract's keys. Rows may also have
been written by others, so nothing that is computed from it may fail on what it holds.
"""

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from chiffon.contract.messages import SCALAR_METRICS

_NUMBERS = tuple(name for name in SCALAR_METRICS if name != "gpu_type")


def free_sql(key: str, missing: str) -> str:
    """Return the SQL for what a filter counts of one metric.

    The number itself; 0 for ``null``; ``missing`` where the key is not there. Bounded, since a
    number that no float can hold would fail every statement that writes the row.
    """
    return (
        f"CASE jsonb_typeof(resource_metrics -> '{key}')"
        f" WHEN 'number' THEN"
        f" least(greatest((resource_metrics ->> '{key}')::numeric, -1e15), 1e15)::float8"
        f" WHEN 'null' THEN 0 ELSE {missing} END"
    )


def free_single_gpu_sql() -> str:
    """Return the SQL for what is free on one GPU; a row with one GPU or none needs no such key."""
    several = (
        "CASE WHEN jsonb_typeof(resource_metrics -> 'gpus') = 'array'"
        " THEN jsonb_array_length(resource_metrics -> 'gpus') > 1 ELSE false END"
    )
    only_one = free_sql("gpu_vram_available_gb", missing="0")
    return free_sql(
        "gpu_vram_max_available_gb", missing=f"CASE WHEN {several} THEN 0 ELSE {only_one} END"
    )


def sound_sql() -> str:
    """Return the SQL that tells whether a row's metrics have the contract's types.

    NULL where nothing was reported. Only true is offered; false is reported as malformed.
    """
    numbers = " AND ".join(
        f"coalesce(jsonb_typeof(resource_metrics -> '{key}'), 'null') IN ('number', 'null')"
        for key in _NUMBERS
    )
    return (
        "CASE WHEN resource_metrics = '{}' THEN NULL"
        " ELSE jsonb_typeof(resource_metrics) = 'object'"
        " AND coalesce(jsonb_typeof(resource_metrics -> 'gpu_type'), 'null')"
        f" IN ('string', 'null') AND {numbers} END"
    )


def _flag(default: str) -> Column[bool]:
    return Column(Boolean, nullable=False, server_default=text(default))


def _number(default: str) -> Column[float]:
    return Column(Float, nullable=False, server_default=text(default))


def _order() -> Column[int]:
    return Column(BigInteger, nullable=False, server_default=text("0"))


def _moment(nullable: bool = True) -> Column[datetime]:
    return Column(DateTime(timezone=True), nullable=nullable)


def _document(default: str) -> Column[Any]:
    return Column(JSONB, nullable=False, server_default=text(default))


def _computed(sql: str) -> Column[float]:
    return Column(Float, Computed(sql, persisted=True))


_OFFERED = (
    "status = 'online' AND metrics_sound AND last_heartbeat_at IS DISTINCT FROM hidden_heartbeat_at"
)


def _best_first() -> tuple[Any, ...]:
    # What the order has no use for is there to be compared without a look at the row.
    return (
        text("coalesce(available_vram_gb, free_vram_gb) DESC"),
        text("coalesce(available_cores, free_cores) DESC"),
        text("performance_score DESC"),
        "agent_id",
        text("coalesce(available_memory_gb, free_memory_gb)"),
        text("coalesce(available_single_gpu_vram_gb, free_single_gpu_vram_gb)"),
    )


class AgentRegistry(SQLModel, table=True):
    """The fleet: one row an agent, as its newest heartbeat has it.

    ``last_heartbeat_at`` is the time of receipt on the database's clock, ``sent_at`` the sender's
    clock. (``incarnation``, ``sequence``) is the order of the heartbeat that the row holds;
    ``lower_incarnations`` counts those of an earlier start that came since. The
    ``free_*`` columns and ``metrics_sound`` are computed from ``resource_metrics`` by PostgreSQL,
    so that rows which others write are found by the same index. ``reserved`` is what is reserved
    on the agent, by reservation, NULL for nothing. ``available_*`` is what that leaves, as
    ``capacity.room`` computes it: whoever changes ``reserved`` or ``resource_metrics`` clears it
    and then writes it anew. NULL means that nothing is reserved or that it is not computed yet;
    ``free_*`` stands in then and is never less. ``hidden_heartbeat_at`` is the heartbeat since
    which the agent is not offered, as its connection closed or its pool is in an outage: any other
    heartbeat shows it again. ``named_at`` is when an operator last drained it or offered it again.
    """

    __tablename__ = "agent_registry"
    __table_args__ = (
        CheckConstraint(
            "status IN ('online', 'offline', 'busy')", name="agent_registry_status_is_known"
        ),
        # The specification asks for it; it serves containment, not the >= of a capacity query.
        Index(
            "idx_agent_registry_resource_metrics",
            "resource_metrics",
            postgresql_using="gin",
            postgresql_ops={"resource_metrics": "jsonb_path_ops"},
        ),
        # The order of the offers: a capacity query reads this index from its start and stops.
        Index("idx_agent_registry_offers", *_best_first(), postgresql_where=text(_OFFERED)),
        # The same of one pool, which may be few among very many.
        Index(
            "idx_agent_registry_pool_offers",
            "pool_name",
            *_best_first(),
            postgresql_where=text(_OFFERED),
        ),
        # The sweep looks for those whose lease is over, and for those who were marked lately.
        Index(
            "idx_agent_registry_lease",
            text(
                "((last_heartbeat_at AT TIME ZONE 'UTC'::text)"
                " + lease_seconds * '00:00:01'::interval)"
            ),
            postgresql_where=text("status IN ('online', 'busy')"),
        ),
        Index(
            "idx_agent_registry_marked",
            "status_changed_at",
            postgresql_where=text("status = 'offline'"),
        ),
        Index(
            "idx_agent_registry_malformed",
            "agent_id",
            postgresql_where=text("NOT metrics_sound"),
        ),
        Index(
            "idx_agent_registry_reserved", "agent_id", postgresql_where=text("reserved IS NOT NULL")
        ),
    )

    agent_id: UUID = Field(default_factory=uuid4, primary_key=True)
    agent_type: str = Field(default="desktop", sa_type=Text)
    pool_name: str = Field(default="default", sa_type=Text)
    capabilities: list[str] = Field(default_factory=list, sa_column=_document("'[]'"))
    status: str = Field(default="offline", sa_type=Text)
    last_heartbeat_at: datetime | None = Field(default=None, sa_column=_moment())
    hidden_heartbeat_at: datetime | None = Field(default=None, sa_column=_moment())
    resource_metrics: dict[str, Any] = Field(default_factory=dict, sa_column=_document("'{}'"))
    performance_score: float = Field(default=0.0, sa_column=_number("0"))
    hostname: str | None = Field(default=None, sa_type=Text)
    agent_version: str | None = Field(default=None, sa_type=Text)
    incarnation: int = Field(default=0, sa_column=_order())
    sequence: int = Field(default=0, sa_column=_order())
    sent_at: datetime | None = Field(default=None, sa_column=_moment())
    interval_seconds: float = Field(default=5.0, sa_column=_number("5"))
    lease_seconds: float = Field(default=15.0, sa_column=_number("15"))
    drained: bool = Field(default=False, sa_column=_flag("false"))
    drain_reason: str | None = Field(default=None, sa_type=Text)
    drained_at: datetime | None = Field(default=None, sa_column=_moment())
    drain_deadline: datetime | None = Field(default=None, sa_column=_moment())
    named_at: datetime | None = Field(default=None, sa_column=_moment())
    status_reason: str | None = Field(default=None, sa_type=Text)
    status_changed_at: datetime | None = Field(default=None, sa_column=_moment())
    lower_incarnations: int = Field(default=0, sa_column=_order())
    lower_incarnation_at: datetime | None = Field(default=None, sa_column=_moment())
    free_vram_gb: float | None = Field(
        default=None, sa_column=_computed(free_sql("gpu_vram_available_gb", missing="0"))
    )
    free_single_gpu_vram_gb: float | None = Field(
        default=None, sa_column=_computed(free_single_gpu_sql())
    )
    free_cores: float | None = Field(
        default=None, sa_column=_computed(free_sql("cpu_cores_available", missing="1"))
    )
    free_memory_gb: float | None = Field(
        default=None, sa_column=_computed(free_sql("memory_available_gb", missing="0"))
    )
    metrics_sound: bool | None = Field(
        default=None, sa_column=Column(Boolean, Computed(sound_sql(), persisted=True))
    )
    available_vram_gb: float | None = Field(default=None, sa_type=Float)
    available_single_gpu_vram_gb: float | None = Field(default=None, sa_type=Float)
    available_cores: float | None = Field(default=None, sa_type=Float)
    available_memory_gb: float | None = Field(default=None, sa_type=Float)
    reserved: dict[str, Any] | None = Field(
        default=None, sa_column=Column(JSONB(none_as_null=True))
    )


class IngestPath(SQLModel, table=True):
    """One row: when a canary last went the whole way from publish to commit.

    It proves the path for ``proves_seconds``; the view ``path_state`` says whether that is now.
    ``fresh_since`` is when that began without a gap; no agent is judged silent by what it did not
    say before then. Until ``grace_until`` some agent's fresh lease is still running.
    ``queue_delay_seconds`` is how long that canary was on its way, ``clock_set_back_at`` when a
    canary was found to be from the future.
    """

    __tablename__ = "ingest_path"
    __table_args__ = (CheckConstraint("only_row = 1", name="ingest_path_has_one_row"),)

    only_row: int = Field(
        default=1,
        sa_column=Column(SmallInteger, primary_key=True, server_default=text("1")),
    )
    fresh_at: datetime = Field(sa_column=_moment(nullable=False))
    proves_seconds: float = Field(sa_type=Float)
    fresh_since: datetime = Field(sa_column=_moment(nullable=False))
    grace_until: datetime = Field(sa_column=_moment(nullable=False))
    queue_delay_seconds: float | None = Field(default=None, sa_type=Float)
    clock_set_back_at: datetime | None = Field(default=None, sa_column=_moment())


class IngestPart(SQLModel, table=True):
    """A part of the path that a canary proves by itself: a queue of heartbeats, or their exchange.

    The path is as fresh as the least fresh of its parts; what was a part of it with another number
    of shards stays and is not looked at.
    """

    __tablename__ = "ingest_part"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    fresh_at: datetime = Field(sa_column=_moment(nullable=False))


class PoolOutage(SQLModel, table=True):
    """The last outage of a pool, when most of it became silent at once; no row if there was none.

    While ``ended_at`` is null nobody in the pool is marked offline for silence; from then on
    everybody has a lease of grace.
    """

    __tablename__ = "pool_outage"

    pool_name: str = Field(sa_column=Column(Text, primary_key=True))
    began_at: datetime = Field(sa_column=_moment(nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=_moment())


class Reservation(SQLModel, table=True):
    """Room that a planner holds, or held: kept for a day after its end, for who asks again.

    ``requests`` counts how often it was requested, so that an answer that nobody took ends it only
    if nobody has requested it again since. ``fence`` grows with every reservation.
    """

    __tablename__ = "reservation"
    __table_args__ = (
        CheckConstraint(
            "state IN ('held', 'released', 'expired', 'revoked')", name="reservation_state_is_known"
        ),
        CheckConstraint(
            "(state = 'held') = (ended_at IS NULL)", name="reservation_ended_has_a_time"
        ),
        UniqueConstraint("holder", "idempotency_key", name="reservation_key"),
        UniqueConstraint("fence", name="reservation_fence_is_unique"),
        Index("idx_reservation_held", "expires_at", postgresql_where=text("state = 'held'")),
        Index("idx_reservation_ended", "ended_at", postgresql_where=text("state <> 'held'")),
    )

    reservation_id: UUID = Field(primary_key=True)
    holder: str = Field(sa_type=Text)
    idempotency_key: UUID | None = None
    request_hash: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    state: str = Field(
        default="held", sa_column=Column(Text, nullable=False, server_default="held")
    )
    reason: str | None = Field(default=None, sa_type=Text)
    fence: int = Field(sa_column=Column(BigInteger, nullable=False))
    lease_seconds: float
    created_at: datetime = Field(sa_column=_moment(nullable=False))
    expires_at: datetime = Field(sa_column=_moment(nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=_moment())
    requests: int = Field(
        default=1, sa_column=Column(Integer, nullable=False, server_default=text("1"))
    )
    gpu_vram_gb: float
    cpu_cores: int
    memory_gb: float
    agent_ids: list[UUID] = Field(sa_column=Column(ARRAY(Uuid), nullable=False))
    places: list[dict[str, Any]] = Field(sa_column=Column(JSONB, nullable=False))
    alternative: int = Field(
        default=0, sa_column=Column(Integer, nullable=False, server_default=text("0"))
    )


class WaitQueueEntry(SQLModel, table=True):
    """Who waits for room, in the order of ``position``, and where the answer goes.

    An orchestrator that answers it has some seconds, until ``answering_until``; then another one
    tries, some ``tries`` at most. Who was offered room keeps the position for a while.
    """

    __tablename__ = "wait_queue"

    wait_id: UUID = Field(primary_key=True)
    position: int = Field(sa_column=Column(BigInteger, Identity(), nullable=False, unique=True))
    request: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    deadline: datetime = Field(sa_column=_moment(nullable=False))
    reply: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    answering_until: datetime | None = Field(default=None, sa_column=_moment())
    tries: int = Field(
        default=0, sa_column=Column(Integer, nullable=False, server_default=text("0"))
    )
    offered_at: datetime | None = Field(default=None, sa_column=_moment())
    offered_agent_id: UUID | None = None
