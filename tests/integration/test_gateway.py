"""The gateway over real HTTP, on a real broker and a real database."""

import asyncio
import json
import logging
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import CapacityQuery
from chiffon.gateway.live import AT_ONCE_AGENTS
from chiffon.registry.agents import Agents
from chiffon.registry.offers import Offers
from chiffon.registry.registry import Registry
from chiffon.registry.rows import AgentRow, Received
from tests.fixtures.gateway import samples, serving
from tests.fixtures.heartbeats import RESOURCES, update
from tests.fixtures.proxy import Proxy
from tests.fixtures.waiting import until

Database = Any
AVAILABLE = "/api/v1/agents/available-capacity"


@pytest.fixture
async def http(broker: str, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(broker, database_url) as client:
        yield client


async def record(registry: Registry, **fields: Any) -> UUID:
    """Record one agent's heartbeat, as just received; returns its id."""
    one = update(**fields)
    await registry.heartbeats.record([Received(one, asyncio.get_running_loop().time())])
    return one.agent_id


async def problem(client: httpx.AsyncClient, path: str) -> tuple[int, str]:
    """Return status and detail of an answer that must be a problem."""
    answer = await client.get(path)
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(body) == {"title", "status", "detail", "code"}
    assert body["status"] == answer.status_code
    assert "Traceback" not in answer.text
    return answer.status_code, body["detail"]


# --- Capacity ---------------------------------------------------------------------------------


async def test_capacity_of_one_agent_is_what_the_service_says(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    agent_id = await record(registry)

    answer = await http.get(f"/api/v1/agents/{agent_id}/capacity")

    assert answer.status_code == 200
    body = answer.json()
    assert {name: body[name] for name in RESOURCES} == RESOURCES
    assert (body["agent_id"], body["status"]) == (str(agent_id), "online")
    assert 0 <= body["heartbeat_age_seconds"] < 30
    said = await OrchestratorService(registry).get_agent_capacity(agent_id)
    assert set(body) == set(said)


async def test_an_agent_without_metrics_answers_with_zeros(
    http: httpx.AsyncClient, database: Database
) -> None:
    agent_id = uuid4()
    await database.execute(
        "INSERT INTO agent_registry (agent_id, agent_type, pool_name, status)"
        " VALUES ($1, 'desktop', 'default', 'offline')",
        agent_id,
    )

    body = (await http.get(f"/api/v1/agents/{agent_id}/capacity")).json()

    assert (body["gpu_vram_total_gb"], body["gpu_type"], body["timestamp"]) == (0, "none", None)


@pytest.mark.parametrize("agent_id", ["not-a-uuid", "1", "3f1c0a52", "%00", "a" * 300])
async def test_an_id_that_is_no_uuid_is_a_400_that_says_so(
    http: httpx.AsyncClient, agent_id: str
) -> None:
    expected = (400, "Invalid agent_id format (must be UUID)")
    assert await problem(http, f"/api/v1/agents/{agent_id}/capacity") == expected
    assert await problem(http, f"/api/v1/agents/{agent_id}") == expected


async def test_an_unknown_agent_is_a_404(http: httpx.AsyncClient) -> None:
    unknown = uuid4()

    for path in (f"/api/v1/agents/{unknown}/capacity", f"/api/v1/agents/{unknown}"):
        assert await problem(http, path) == (404, f"agent {unknown} is not in the registry")


async def test_available_capacity_is_a_list_best_first_with_what_it_is_worth(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    small = await record(registry, resources={"gpu_vram_available_gb": 8.0})
    large = await record(registry, resources={"gpu_vram_available_gb": 16.0})
    await record(registry, status="busy")

    answer = await http.get(AVAILABLE)

    assert [one["agent_id"] for one in answer.json()] == [str(large), str(small)]
    # No canary has proven the path: nobody runs an orchestrator here.
    assert answer.headers["chiffon-degraded"] == "true"
    assert answer.headers["chiffon-total-matches"] == "2"
    assert answer.headers["chiffon-total-relation"] == "eq"
    assert "T" in answer.headers["chiffon-as-of"]


async def test_nothing_that_fits_is_an_empty_list(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry)

    answer = await http.get(AVAILABLE, params={"min_gpu_vram_gb": 500})

    assert (answer.status_code, answer.json()) == (200, [])


async def test_every_filter_of_the_contract_filters_over_http(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    fitting = await record(
        registry,
        pool_name="lab",
        agent_type="research",
        capabilities=["cuda12", "ssd"],
        resources={
            "gpu_vram_available_gb": 20.0,
            "cpu_cores_available": 12,
            "memory_available_gb": 64.0,
        },
    )
    filters: dict[str, Any] = {
        "min_gpu_vram_gb": 19.5,
        "min_single_gpu_vram_gb": 19.5,
        "min_cpu_cores": 12,
        "min_memory_gb": 64,
        "agent_type": "research",
        "pool_name": "lab",
        "gpu_type": "nvidia",
        "capabilities": ["cuda12", "ssd"],
    }
    others: dict[str, Any] = {
        "min_gpu_vram_gb": 20.5,
        "min_single_gpu_vram_gb": 20.5,
        "min_cpu_cores": 13,
        "min_memory_gb": 64.5,
        "agent_type": "desktop",
        "pool_name": "default",
        "gpu_type": "amd",
        "capabilities": ["cuda12", "tpu"],
    }

    found = (await http.get(AVAILABLE, params=filters)).json()

    assert [one["agent_id"] for one in found] == [str(fitting)]
    assert set(others) | {"limit", "explain", "show_reserved"} == set(CapacityQuery.model_fields)
    for name, value in others.items():
        answer = await http.get(AVAILABLE, params={**filters, name: value})
        assert (name, answer.status_code, answer.json()) == (name, 200, [])


async def test_any_type_is_asked_for_by_that_word(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, agent_type="code")

    assert (await http.get(AVAILABLE)).json() == []
    assert len((await http.get(AVAILABLE, params={"agent_type": "any"})).json()) == 1


async def test_more_matches_than_the_limit_are_said_to_be_more(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    for _ in range(3):
        await record(registry)

    answer = await http.get(AVAILABLE, params={"limit": 2})

    assert len(answer.json()) == 2
    assert answer.headers["chiffon-total-matches"] == "2"
    assert answer.headers["chiffon-total-relation"] == "gte"


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("min_gpu_vram_gb=-1", "min_gpu_vram_gb"),
        ("min_gpu_vram_gb=nan", "min_gpu_vram_gb"),
        ("min_gpu_vram_gb=inf", "min_gpu_vram_gb"),
        ("min_gpu_vram_gb=1e400", "min_gpu_vram_gb"),
        ("min_gpu_vram_gb=abc", "min_gpu_vram_gb"),
        ("min_gpu_vram_gb=", "min_gpu_vram_gb"),
        ("min_cpu_cores=0", "min_cpu_cores"),
        ("min_cpu_cores=1.5", "min_cpu_cores"),
        ("min_cpu_cores=9999999999999999999999", "min_cpu_cores"),
        ("min_memory_gb=-0.1", "min_memory_gb"),
        ("agent_type=toaster", "agent_type"),
        ("pool_name=a%20b", "pool_name"),
        ("pool_name=a%00b", "pool_name"),
        ("gpu_type=NVIDIA", "gpu_type"),
        ("capabilities=a%20b", "capabilities.0"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("min_gpu_vram=1", "unknown field min_gpu_vram; did you mean min_gpu_vram_gb?"),
        ("limit=1&limit=2", "limit: given more than once"),
    ],
)
async def test_a_bad_parameter_is_a_400_that_names_it(
    http: httpx.AsyncClient, query: str, named: str
) -> None:
    for path in (AVAILABLE, "/api/v1/capacity"):
        status, detail = await problem(http, f"{path}?{query}")
        assert status == 400
        assert detail.startswith(named)


async def test_an_error_does_not_repeat_what_was_asked(http: httpx.AsyncClient) -> None:
    long = "x" * 20_000
    answer = await http.get(AVAILABLE, params={"min_cpu_cores": long})
    other = await http.get(AVAILABLE, params={long: 1})

    assert (answer.status_code, other.status_code) == (400, 400)
    assert len(answer.text) + len(other.text) < 1_000


async def test_who_asks_and_who_is_asked_stand_in_the_log(
    http: httpx.AsyncClient, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chiffon")
    await record(registry)

    await http.get(AVAILABLE, params={"min_gpu_vram_gb": 4, "min_cpu_cores": 2})

    assert "Found 1 agents with capacity (min_gpu=4.0GB, min_cpu=2)" in caplog.text


async def test_why_agents_are_no_answer_is_told_for_each(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, hostname="small", resources={"gpu_vram_available_gb": 8.0})
    await record(registry, hostname="full", resources={"cpu_cores_available": 0})
    await record(registry, hostname="gone", status="offline")
    fitting = await record(registry, hostname="good")

    body = (await http.get("/api/v1/capacity", params={"min_gpu_vram_gb": 20})).json()

    assert [one["agent_id"] for one in body["offers"]["agents"]] == [str(fitting)]
    why = body["explanation"]
    assert why["summary"] == (
        "4 agents: 1 fit, 1 offline, 1 too little free VRAM (best 8 of 20 on small), "
        "1 too few free cores"
    )
    assert {one["hostname"]: one["reasons"] for one in why["nearest"]} == {
        "small": ["too little free VRAM (8 of 20)"],
        "full": ["too few free cores (0 of 1)"],
        "gone": ["offline"],
    }


def cursor_of(*words: str) -> str:
    return b64encode(json.dumps(words).encode()).decode()


async def test_what_is_unknown_is_explained_as_unknown_and_not_as_nothing(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, resources={"gpu_vram_available_gb": None, "gpu_vram_total_gb": None})

    body = (await http.get("/api/v1/capacity", params={"min_gpu_vram_gb": 20})).json()

    [miss] = body["explanation"]["nearest"]
    assert miss["reasons"] == ["too little free VRAM (unknown of 20)"]
    assert body["explanation"]["summary"] == "1 agent: 1 too little free VRAM"


# --- The fleet --------------------------------------------------------------------------------


async def test_agents_are_listed_a_page_at_a_time(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    wanted = [
        await record(registry, pool_name=pool, hostname=host)
        for pool, host in [("a", "one"), ("a", "two"), ("a", None), ("b", "one"), ("b", "one")]
    ]
    found: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        body = (await http.get("/api/v1/agents", params={"limit": 2, **after})).json()
        found += [one["agent_id"] for one in body["agents"]]
        after = {"after": body["next"]}

    assert body["next"] is None
    assert len(found) == 5
    assert found[0] == str(wanted[2]), "an unknown host comes first"
    assert set(found) == {str(one) for one in wanted}


async def test_the_list_is_filtered(http: httpx.AsyncClient, registry: Registry) -> None:
    busy = await record(registry, status="busy", pool_name="lab", agent_type="code")
    await record(registry)

    for name, value in {"status": "busy", "pool_name": "lab", "agent_type": "code"}.items():
        body = (await http.get("/api/v1/agents", params={name: value})).json()
        assert [one["agent_id"] for one in body["agents"]] == [str(busy)]


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "e30=",
        cursor_of("a", "b", "c"),
        cursor_of("\0", "", str(UUID(int=1))),
        cursor_of("\ud800", "", str(UUID(int=1))),
    ],
)
async def test_a_cursor_that_is_from_no_page_is_a_400(http: httpx.AsyncClient, cursor: str) -> None:
    status, detail = await problem(http, f"/api/v1/agents?after={cursor}")

    assert (status, detail) == (400, "after: not the `next` of a page")


async def test_all_that_is_known_of_an_agent_is_shown(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    agent_id = await record(registry, resources={"gpus": [{"index": 0, "name": "A <b>GPU</b>"}]})

    body = (await http.get(f"/api/v1/agents/{agent_id}")).json()

    assert (body["hostname"], body["is_silent"], body["drained"]) == ("rig-7", False, False)
    assert body["resources"]["gpus"][0]["name"] == "A <b>GPU</b>"


async def test_the_fleet_is_summed_up(
    http: httpx.AsyncClient, registry: Registry, database: Database
) -> None:
    await record(registry)
    await record(registry, status="busy")
    silent = await record(registry)
    await database.execute(
        "UPDATE agent_registry SET last_heartbeat_at = now() - interval '1 hour'"
        " WHERE agent_id = $1",
        silent,
    )

    body = (await http.get("/api/v1/fleet")).json()

    assert {name: body[name] for name in ("online", "busy", "offline", "silent")} == {
        "online": 2,
        "busy": 1,
        "offline": 0,
        "silent": 1,
    }


async def test_recent_readings_are_kept_in_memory(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    agent_id = await record(registry, sequence=1, resources={"cpu_percent": 10.0})
    readings: list[Any] = []

    async def has(count: int) -> bool:
        readings[:] = (await http.get(f"/api/v1/agents/{agent_id}/history")).json()["readings"]
        return len(readings) >= count

    async with http.stream("GET", "/stream"):  # somebody looks, so it is read each second
        await until(lambda: has(1), "the first reading")
        again = update(agent_id, sequence=2, resources={"cpu_percent": None})
        await registry.heartbeats.record([Received(again, asyncio.get_running_loop().time())])
        await until(lambda: has(2), "the second reading")

    assert [one["cpu_percent"] for one in readings] == [10.0, None]
    assert readings[0]["at"] < readings[1]["at"]


# --- The stream -------------------------------------------------------------------------------


class Stream:
    """Events of ``/stream``, as a browser reads them."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.aiter_lines()

    async def next(self, name: str) -> Any:
        """Return the data of the next event of this name."""
        async with asyncio.timeout(30):
            async for line in self._lines:
                if line == f"event: {name}":
                    data = await anext(self._lines)
                    return json.loads(data.removeprefix("data: "))
        raise AssertionError(f"the stream ended before {name}")


async def test_the_stream_begins_with_the_fleet_and_tells_what_changes(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    """The gateway looks for changes once a second."""
    first = await record(registry, hostname="first")
    async with http.stream("GET", "/stream") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        stream = Stream(answer)
        await stream.next("restart")
        [agent] = await stream.next("agents")
        assert (agent["id"], agent["host"], agent["status"]) == (str(first), "first", "online")
        assert (agent["vram"], agent["vram_total"]) == (20.5, 24.0)

        second = await record(registry, hostname="second")
        [agent] = await stream.next("agents")
        assert agent["id"] == str(second), "only what changed"

        assert (await stream.next("fleet"))["online"] == 2
        await registry.agents.forget([first])
        assert await stream.next("gone") == [str(first)]


async def test_a_big_fleet_is_read_and_sent_a_part_at_a_time(
    http: httpx.AsyncClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    show_many = Agents.show_many

    async def shown(self: Agents, agent_ids: Sequence[UUID]) -> list[AgentRow]:
        sizes.append(len(agent_ids))
        return await show_many(self, agent_ids)

    monkeypatch.setattr(Agents, "show_many", shown)
    batch = [update() for _ in range(2 * AT_ONCE_AGENTS + 1)]
    await registry.heartbeats.record(
        [Received(one, asyncio.get_running_loop().time()) for one in batch]
    )

    known: set[str] = set()
    async with http.stream("GET", "/stream") as answer:
        stream = Stream(answer)
        while len(known) < len(batch):
            agents = await stream.next("agents")
            assert len(agents) <= AT_ONCE_AGENTS
            known.update(agent["id"] for agent in agents)

    assert known == {str(one.agent_id) for one in batch}
    assert sum(sizes) == len(batch)
    assert max(sizes) == AT_ONCE_AGENTS


async def test_a_page_that_does_not_read_is_let_go(
    http: httpx.AsyncClient,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So much has to be sent that the socket's buffers are full."""
    caplog.set_level(logging.INFO, "chiffon")
    monkeypatch.setattr("chiffon.gateway.pages.SEND_SECONDS", 0.5)
    # More than the sockets between us take.
    problems = ["x" * 512] * 64
    batch = [update(resources={"probe_errors": problems}) for _ in range(400)]
    for start in range(0, 400, 100):
        part = sorted(batch[start : start + 100], key=lambda one: one.agent_id)
        await registry.heartbeats.record(
            [Received(one, asyncio.get_running_loop().time()) for one in part]
        )
    _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port, limit=1_024)
    try:
        writer.write(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await writer.drain()

        async def followers() -> int:
            return int(samples((await http.get("/metrics")).text)["chiffon_page_followers"])

        async def follows() -> bool:
            return await followers() == 1

        async def is_let_go() -> bool:
            return "a page that does not read is let go" in caplog.text and await followers() == 0

        await until(follows, "a follower")
        await until(is_let_go, "the follower is let go")
    finally:
        writer.close()


async def test_a_stream_ends_with_the_gateway(broker: str, database_url: str) -> None:
    async with serving(broker, database_url) as http:
        context = http.stream("GET", "/stream")
        answer = await context.__aenter__()
        await Stream(answer).next("restart")
    # The gateway has stopped although somebody followed; that somebody was let go in order.
    await context.__aexit__(None, None, None)


async def test_rows_that_others_wrote_break_nobodys_page(
    http: httpx.AsyncClient, registry: Registry, database: Database
) -> None:
    good = await record(registry, hostname="good")
    await database.execute(
        """INSERT INTO agent_registry (agent_id, agent_type, pool_name, status, capabilities,
               resource_metrics, last_heartbeat_at)
           VALUES (gen_random_uuid(), 'x', '', 'online', '{"a": 1}', '{"cpu_percent": 1e400,
               "gpus": [7, {"name": 3}], "probe_errors": "x", "gpu_type": []}', now()),
                  (gen_random_uuid(), 'x', '', 'online', '[1, "gpu"]', '[]', now()),
                  (gen_random_uuid(), 'x', '', 'online', '[]',
                   '{"gpu_vram_available_gb": 1e5000, "gpu_type": "none"}', now())"""
    )

    listed = await http.get("/api/v1/agents")
    assert listed.status_code == 200
    assert len(listed.json()["agents"]) == 4
    async with http.stream("GET", "/stream") as answer:
        agents = await Stream(answer).next("agents")
    assert len(agents) == 4
    assert [one["host"] for one in agents if one["id"] == str(good)] == ["good"]
    assert (await http.get("/metrics")).status_code == 200
    assert (await http.get("/api/v1/capacity?agent_type=any")).status_code == 200


# --- When things are away ---------------------------------------------------------------------


async def test_a_database_that_is_away_is_a_503_that_says_when_to_come_back(
    broker: str, database_url: str, registry: Registry
) -> None:
    agent_id = await record(registry)
    proxy = Proxy.to(database_url)
    async with proxy.running(), serving(broker, proxy.url(database_url)) as http:
        assert (await http.get(AVAILABLE)).status_code == 200
        async with http.stream("GET", "/stream") as answer:
            stream = Stream(answer)
            await stream.next("fleet")
            proxy.resets_after_bytes = 0

            for path in (
                AVAILABLE,
                f"/api/v1/agents/{agent_id}/capacity",
                f"/api/v1/agents/{agent_id}",
                "/api/v1/agents",
                "/api/v1/fleet",
                "/api/v1/capacity",
            ):
                answer = await http.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
                assert answer.json()["code"] == "unavailable"
            assert "the database" in await stream.next("trouble")
            ready = await http.get("/readyz?verbose")
            assert ready.status_code == 503
            assert "[-]database failed" in ready.text
            assert "[+]broker ok" in ready.text
            assert (await http.get("/livez")).text == "ok\n"
            assert "chiffon_registry_up 0.0" in (await http.get("/metrics")).text

            proxy.resets_after_bytes = None
            await stream.next("fleet")
        assert (await http.get(AVAILABLE)).status_code == 200


async def test_a_failure_that_nobody_foresaw_is_a_500_without_a_trace(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(Offers, "find", fails)
    monkeypatch.setattr(Agents, "show", fails)

    assert await problem(http, AVAILABLE) == (500, "Failed to fetch available capacity")
    assert await problem(http, f"/api/v1/agents/{uuid4()}/capacity") == (
        500,
        "Failed to fetch agent capacity",
    )
    assert await problem(http, f"/api/v1/agents/{uuid4()}") == (
        500,
        "the gateway failed; see its log",
    )
    assert 'route="/api/v1/agents/available-capacity",status="500"' in (
        (await http.get("/metrics")).text
    )


async def test_a_database_without_tables_is_not_ready(broker: str, empty_database_url: str) -> None:
    async with serving(broker, empty_database_url) as http:
        ready = await http.get("/readyz", params={"verbose": ""})

        assert ready.status_code == 503
        assert "[-]database failed: the database lacks tables" in ready.text
        assert "[-]migrations failed" in ready.text
        assert "chiffon db upgrade" in ready.text
        assert (await http.get(AVAILABLE)).status_code == 503


async def test_a_broker_that_is_away_makes_it_not_ready_and_answers_all_the_same(
    database_url: str,
) -> None:
    async with serving("amqp://u:secret@127.0.0.1:1/", database_url) as http:
        ready = await http.get("/readyz?verbose")

        assert ready.status_code == 503
        assert "[-]broker failed: cannot reach the broker at 127.0.0.1:1" in ready.text
        assert "secret" not in ready.text
        assert (await http.get("/readyz")).text == "not ready: broker\n"
        assert (await http.get(AVAILABLE)).status_code == 200


async def test_health_is_told_to_who_asks_for_the_head_alone(http: httpx.AsyncClient) -> None:
    assert (await http.head("/livez")).status_code == 200


async def test_all_well_is_ready(http: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return (await http.get("/readyz")).status_code == 200

    await until(is_ready, "the gateway is ready")
    assert (await http.get("/readyz?verbose")).text.splitlines() == [
        "[+]broker ok",
        "[+]database ok",
        "[+]migrations ok",
        "readyz check passed",
    ]


# --- Manners ----------------------------------------------------------------------------------


async def test_an_unknown_path_or_method_is_a_problem_too(http: httpx.AsyncClient) -> None:
    assert (await problem(http, "/api/v1/nothing"))[0] == 404
    assert (await problem(http, "/static/../app.py"))[0] == 404
    assert (await problem(http, "/static/%2e%2e%2fapp.py"))[0] == 404
    refused = await http.post(AVAILABLE)
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, HEAD"
    refused = await http.delete("/api/v1/reservations")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, POST")


async def test_a_request_for_another_host_is_refused(http: httpx.AsyncClient) -> None:
    """A page from elsewhere, whose name was made to point here, must not read the fleet."""
    for host, status in {
        "evil.example": 400,
        "127.0.0.1.evil.example": 400,
        "evil.example:80@localhost": 200,
        "[::1": 400,
        "[::1]:8440": 200,
        "LOCALHOST": 200,
    }.items():
        for path in (AVAILABLE, "/", "/stream-that-is-none"):
            answer = await http.get(path, headers={"Host": host})
            wanted = 404 if path.startswith("/stream") and status == 200 else status
            assert (host, path, answer.status_code) == (host, path, wanted)
            assert answer.headers["x-content-type-options"] == "nosniff"
    # Those who look after it come by its address.
    assert (await http.get("/livez", headers={"Host": "10.0.0.7"})).status_code == 200


async def test_too_many_requests_at_once_are_told_to_come_back(
    http: httpx.AsyncClient, database: Database
) -> None:
    await database.execute("BEGIN; LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
    asking = [asyncio.create_task(http.get("/api/v1/agents")) for _ in range(90)]
    try:

        async def is_refused() -> bool:
            done = [one for one in asking if one.done()]
            return any(one.result().headers.get("retry-after") == "1" for one in done)

        await until(is_refused, "a refusal")
        assert (await http.get("/livez")).status_code == 200
    finally:
        await database.execute("ROLLBACK")
        answers = await asyncio.gather(*asking)
    assert {one.status_code for one in answers} == {200, 503}


async def test_slow_bodies_keep_nobody_from_an_answer(http: httpx.AsyncClient) -> None:
    """Two hundred connections that promise a body and never send it."""
    host, port = http.base_url.host, http.base_url.port
    slow = [await asyncio.open_connection(host, port) for _ in range(200)]
    try:
        for _, writer in slow:
            writer.write(
                f"GET {AVAILABLE} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Length: 100000\r\n\r\n{".encode()
            )
            await writer.drain()

        assert (await http.get("/livez")).status_code == 200

        async def is_answered() -> bool:
            return (await http.get(AVAILABLE)).status_code == 200

        await until(is_answered, "an answer beside them")
        for reader, _ in slow:
            async with asyncio.timeout(30):
                assert (await reader.readline()).split()[1] in (b"200", b"503")
    finally:
        for _, writer in slow:
            writer.close()


# --- Metrics ----------------------------------------------------------------------------------


async def test_metrics_tell_of_each_agent_and_forget_who_was_forgotten(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    agent_id = await record(registry, resources={"memory_available_gb": None})

    told = samples((await http.get("/metrics")).text)

    own = f'{{agent_id="{agent_id}"}}'
    assert told['chiffon_agents{status="online"}'] == 1
    assert told[f"chiffon_agent_up{own}"] == 1
    assert told[f"chiffon_agent_gpu_vram_available_bytes{own}"] == 20.5 * 2**30
    assert told[f"chiffon_agent_cpu_busy_ratio{own}"] == 0.125
    assert told[f"chiffon_agent_cpu_cores_available{own}"] == 14
    assert f"chiffon_agent_memory_available_bytes{own}" not in told, "unknown is no number"
    assert abs(told[f"chiffon_agent_last_heartbeat_timestamp_seconds{own}"] - 1.75e9) < 2.5e8

    await registry.agents.forget([agent_id])

    after = (await http.get("/metrics")).text
    assert str(agent_id) not in after
    assert samples(after)['chiffon_agents{status="online"}'] == 0


async def test_agents_beyond_the_limit_have_no_series_and_are_counted(
    broker: str, database_url: str, registry: Registry
) -> None:
    for _ in range(3):
        await record(registry)
    async with serving(broker, database_url, metrics_agent_limit=2) as http:
        text = (await http.get("/metrics")).text

    told = samples(text)
    assert sum(name.startswith("chiffon_agent_up{") for name in told) == 2
    assert told["chiffon_agents_without_series"] == 1
    assert told['chiffon_agents{status="online"}'] == 3


async def test_requests_are_counted_by_route(http: httpx.AsyncClient) -> None:
    name = 'chiffon_http_requests_total{route="/api/v1/agents/{agent_id}",status="404"}'
    before = samples((await http.get("/metrics")).text).get(name, 0)

    await http.get(f"/api/v1/agents/{uuid4()}")

    assert samples((await http.get("/metrics")).text)[name] == before + 1
