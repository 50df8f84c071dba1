"""The capacity query against a brute-force filter of the same rows."""

import asyncio
import json
import logging
import time
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityQuery
from chiffon.embedded.postgres import asyncpg_url
from chiffon.errors import AgentNotFoundError
from chiffon.registry.registry import Registry
from tests.fixtures.heartbeats import RESOURCES
from tests.fixtures.servers import Servers, new_database
from tests.fixtures.sweeping import sweep

INSERT = """
INSERT INTO agent_registry (agent_id, agent_type, pool_name, capabilities, status, hostname,
  drained, performance_score, lease_seconds, last_heartbeat_at, resource_metrics)
SELECT a.id, a.type, a.pool, a.capabilities::jsonb, a.status, 'h', a.drained, a.score, 15,
       statement_timestamp() - a.age * interval '1 second', a.metrics::jsonb
  FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::boolean[],
              $7::float8[], $8::float8[], $9::text[])
       AS a (id, type, pool, capabilities, status, drained, score, age, metrics)
"""


@dataclass(frozen=True)
class Agent:
    """A row as the test wrote it."""

    agent_id: UUID
    agent_type: str
    pool_name: str
    capabilities: list[str]
    status: str
    drained: bool
    score: float
    age: float | None
    metrics: dict[str, Any]

    def free(self, key: str, missing: float) -> float:
        value = self.metrics.get(key, missing)
        return 0 if value is None else float(value)

    def free_on_one_gpu(self) -> float:
        is_one = len(self.metrics.get("gpus") or []) < 2
        missing = self.free("gpu_vram_available_gb", 0) if is_one else 0
        return self.free("gpu_vram_max_available_gb", missing)


def fits(agent: Agent, query: CapacityQuery) -> bool:
    """Say what the query should say, one plain condition after the other."""
    return (
        agent.status == "online"
        and not agent.drained
        and agent.age is not None
        and agent.age < 15
        and agent.metrics != {}
        and agent.free("gpu_vram_available_gb", 0) >= query.min_gpu_vram_gb
        and agent.free_on_one_gpu() >= query.min_single_gpu_vram_gb
        and agent.free("cpu_cores_available", 1) >= query.min_cpu_cores
        and agent.free("memory_available_gb", 0) >= query.min_memory_gb
        and query.agent_type in (None, agent.agent_type)
        and query.pool_name in (None, agent.pool_name)
        and query.gpu_type in (None, agent.metrics.get("gpu_type"))
        and set(query.capabilities) <= set(agent.capabilities)
    )


def misses(agent: Agent, query: CapacityQuery) -> list[str]:
    """Return the fields of the question that alone keep a usable agent from being offered."""
    if not fits(agent, EVERYBODY):
        return []
    return [
        name
        for name in CapacityQuery.model_fields
        if not fits(agent, EVERYBODY.model_copy(update={name: getattr(query, name)}))
    ]


def best_first(agent: Agent) -> tuple[float, float, float, UUID]:
    return (
        -agent.free("gpu_vram_available_gb", 0),
        -agent.free("cpu_cores_available", 1),
        -agent.score,
        agent.agent_id,
    )


sizes = st.sampled_from([0.0, 4.0, 8.0, 10.5, 24.0, 80.0])
types = st.sampled_from(["desktop", "code", "research"])
pools = st.sampled_from(["default", "lab"])
words = st.lists(st.sampled_from(["gpu", "cuda12", "ssd"]), unique=True)
metrics = st.fixed_dictionaries(
    {},
    optional={
        "gpu_vram_available_gb": sizes | st.none(),
        "gpu_vram_max_available_gb": sizes | st.none(),
        "gpus": st.sampled_from([None, [], [{"index": 0}], [{"index": 0}, {"index": 1}]]),
        "cpu_cores_available": st.integers(0, 16) | st.none(),
        "memory_available_gb": sizes | st.none(),
        "gpu_type": st.sampled_from(["nvidia", "amd", "none"]) | st.none(),
    },
)
agents = st.builds(
    Agent,
    agent_id=st.uuids(),
    agent_type=types,
    pool_name=pools,
    capabilities=words,
    status=st.sampled_from(["online", "online", "online", "busy", "offline"]),
    drained=st.sampled_from([False, False, False, True]),
    score=st.sampled_from([0.0, 1.0]),
    age=st.sampled_from([0.0, 0.0, 0.0, 9.0, 15.1, 1e6]) | st.none(),
    metrics=metrics,
)
fleets = st.lists(agents, min_size=50, max_size=50, unique_by=lambda agent: agent.agent_id)
queries = st.builds(
    CapacityQuery,
    min_gpu_vram_gb=st.just(0.0) | sizes,
    min_single_gpu_vram_gb=st.just(0.0) | st.just(0.0) | sizes,
    min_cpu_cores=st.just(0) | st.integers(0, 12),
    min_memory_gb=st.just(0.0) | sizes,
    agent_type=st.none() | types,
    pool_name=st.none() | pools,
    gpu_type=st.none() | st.none() | st.sampled_from(["nvidia", "amd", "none"]),
    capabilities=st.just([]) | words,
    limit=st.integers(1, 60),
    explain=st.booleans(),
)


EVERYBODY = CapacityQuery(min_cpu_cores=0, agent_type=None, limit=1_000)


async def write(connection: "asyncpg.Connection[asyncpg.Record]", fleet: list[Agent]) -> None:
    rows = [
        (
            agent.agent_id,
            agent.agent_type,
            agent.pool_name,
            json.dumps(agent.capabilities),
            agent.status,
            agent.drained,
            agent.score,
            agent.age,
            json.dumps(agent.metrics),
        )
        for agent in fleet
    ]
    await connection.execute("TRUNCATE agent_registry")
    await connection.execute(INSERT, *(list(column) for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("fleets_tried", [20, pytest.param(200, marks=pytest.mark.deep)])
def test_find_returns_what_a_brute_force_filter_returns_best_first(
    servers: Servers, fleets_tried: int
) -> None:
    """Hypothesis drives one loop and one database through many fleets of 50 agents."""
    with asyncio.Runner() as runner:
        new = new_database(servers, migrated=True)
        url = runner.run(new.__aenter__())
        opened = Registry.open(url)
        registry = runner.run(opened.__aenter__())
        connection = runner.run(asyncpg.connect(asyncpg_url(url)))
        service = OrchestratorService(registry)
        offered: list[int] = []

        @settings(max_examples=fleets_tried, suppress_health_check=list(HealthCheck))
        @given(fleets, st.lists(queries, min_size=1, max_size=4))
        def compare(fleet: list[Agent], questions: list[CapacityQuery]) -> None:
            runner.run(write(connection, fleet))
            for query in [EVERYBODY, *questions]:
                answer = runner.run(service.find(query))
                expected = sorted((agent for agent in fleet if fits(agent, query)), key=best_first)
                counted = min(len(expected), 1_000 if query.explain else query.limit)
                offered.append(len(expected))
                assert [offer.agent_id for offer in answer.agents] == [
                    agent.agent_id for agent in expected[: query.limit]
                ]
                assert answer.total_matches == counted
                assert answer.total_relation == ("eq" if counted == len(expected) else "gte")
                why = runner.run(service.explain(query))
                assert (why.agents, why.fitting) == (len(fleet), len(expected))
                assert why.fitting + sum(one.agents for one in why.obstacles) == why.agents
                assert {one.agent_id for one in why.nearest} == {
                    agent.agent_id for agent in fleet if agent not in expected
                }
                assert all(one.reasons for one in why.nearest)
                least = min(
                    (len(broken) for agent in fleet if (broken := misses(agent, query))), default=0
                )
                if expected or not least:
                    assert why.relaxation is None
                    continue
                assert why.relaxation is not None
                assert len(why.relaxation.changes) == least, "the fewest changes that would do"
                relaxed = query.model_copy(update={**why.relaxation.changes, "limit": 1_000})
                found = runner.run(service.find(relaxed))
                assert why.relaxation.agent_id in {one.agent_id for one in found.agents}

        try:
            compare()
            assert sum(1 for count in offered if count) > fleets_tried / 2, (
                "too few questions had an answer"
            )
        finally:
            runner.run(connection.close())
            runner.run(opened.__aexit__(None, None, None))
            runner.run(new.__aexit__(None, None, None))


ONLINE = Agent(uuid4(), "desktop", "default", [], "online", False, 0.0, 0.0, RESOURCES)


@pytest.fixture
def service(registry: Registry) -> OrchestratorService:
    return OrchestratorService(registry)


MALFORMED: list[Any] = [
    {"gpu_vram_available_gb": "a lot"},
    {**RESOURCES, "gpu_vram_available_gb": "24"},
    {**RESOURCES, "cpu_cores_available": True},
    {**RESOURCES, "memory_available_gb": [1]},
    {**RESOURCES, "cpu_load_1min": {"a": 1}},
    {**RESOURCES, "gpu_type": 7},
    {**RESOURCES, "gpu_vram_max_available_gb": "much"},
    [1, 2],
    "text",
    5,
]


async def test_rows_with_malformed_metrics_are_skipped_with_a_warning_that_names_each(
    service: OrchestratorService,
    database: "asyncpg.Connection[asyncpg.Record]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = [replace(ONLINE, agent_id=uuid4(), metrics=metrics) for metrics in MALFORMED]
    await write(database, [ONLINE, *bad])

    found = await service.get_available_capacity(min_gpu_vram_gb=4.0, min_cpu_cores=2)

    assert [one["agent_id"] for one in found] == [str(ONLINE.agent_id)]
    for agent in bad:
        assert f"agent {agent.agent_id} is not offered" in caplog.text
        assert (await service.show(agent.agent_id)).status == "online"


async def test_eight_cards_with_little_free_do_not_take_one_large_model(
    service: OrchestratorService, database: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    eight = [{"index": index, "vram_available_gb": 10.0} for index in range(8)]
    metrics = {
        **RESOURCES,
        "gpu_vram_total_gb": 640.0,
        "gpu_vram_available_gb": 80.0,
        "gpu_vram_max_available_gb": 10.0,
        "gpus": eight,
    }
    await write(database, [replace(ONLINE, metrics=metrics)])

    together = await service.find(CapacityQuery(min_gpu_vram_gb=40.0))
    on_one = await service.find(CapacityQuery(min_single_gpu_vram_gb=40.0))
    small = await service.find(CapacityQuery(min_single_gpu_vram_gb=10.0))

    assert [offer.gpu_vram_max_available_gb for offer in together.agents] == [10.0]
    assert on_one.agents == []
    assert len(small.agents) == 1


async def test_a_number_too_large_for_a_float_harms_nobody(
    service: OrchestratorService, database: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await write(database, [ONLINE])
    await database.execute(
        "INSERT INTO agent_registry (agent_id, agent_type, pool_name, status, last_heartbeat_at,"
        """ resource_metrics) VALUES (gen_random_uuid(), 'desktop', 'default', 'online', now(),
         '{"gpu_vram_available_gb": 1e999, "cpu_cores_available": 1e999}')"""
    )

    found = await service.find(CapacityQuery())

    assert ONLINE.agent_id in [offer.agent_id for offer in found.agents]


async def test_capacity_as_dicts_logs_how_many_were_found(
    service: OrchestratorService,
    database: "asyncpg.Connection[asyncpg.Record]",
    caplog: pytest.LogCaptureFixture,
) -> None:
    await write(database, [replace(ONLINE, agent_id=uuid4()) for _ in range(3)])

    with caplog.at_level(logging.INFO, "chiffon"):
        found = await service.get_available_capacity(min_gpu_vram_gb=4.0, min_cpu_cores=2)

    assert len(found) == 3
    assert "Found 3 agents with capacity (min_gpu=4.0GB, min_cpu=2)" in caplog.messages


async def test_one_agents_capacity_as_a_dict(
    service: OrchestratorService, database: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await write(database, [ONLINE])

    answer = await service.get_agent_capacity(str(ONLINE.agent_id))

    assert {name: answer[name] for name in RESOURCES} == RESOURCES
    assert answer["status"] == "online"
    assert answer["timestamp"].startswith("20")
    assert answer["heartbeat_age_seconds"] >= 0


async def test_an_unknown_agent_is_an_error_of_its_own(service: OrchestratorService) -> None:
    unknown = uuid4()

    with pytest.raises(AgentNotFoundError) as refused:
        await service.get_agent_capacity(unknown)

    assert refused.value.agent_id == unknown


@pytest.mark.parametrize(
    "needs",
    [
        {"min_gpu_vram_gb": -1.0},
        {"min_cpu_cores": -1},
        {"limit": 0},
        {"min_gpu_vram_gb": float("nan")},
    ],
)
async def test_needs_out_of_range_are_refused(
    service: OrchestratorService, needs: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError):
        await service.get_available_capacity(**needs)


async def test_an_answer_is_degraded_until_a_canary_came_and_grace_is_over(
    service: OrchestratorService,
    registry: Registry,
    database: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    async def degraded() -> bool:
        return (await service.find(CapacityQuery())).degraded

    await write(database, [replace(ONLINE, age=60.0)])
    assert await degraded()  # no canary yet

    await registry.path.mark_fresh(time.monotonic())
    assert await degraded()  # a silent agent has a fresh lease to speak

    await database.execute("UPDATE agent_registry SET last_heartbeat_at = now()")
    await sweep(registry)
    assert not await degraded()

    await database.execute("UPDATE ingest_path SET fresh_at = now() - interval '6 seconds'")
    assert await degraded()


async def test_a_fresh_start_waits_for_nothing(
    service: OrchestratorService,
    registry: Registry,
    database: "asyncpg.Connection[asyncpg.Record]",
) -> None:
    await registry.path.mark_fresh(time.monotonic())
    await write(database, [ONLINE])

    answer = await service.find(CapacityQuery())

    assert [offer.agent_id for offer in answer.agents] == [ONLINE.agent_id]
    assert not answer.degraded
