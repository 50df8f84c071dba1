"""Metrics and health of orchestrator and agent, and what Prometheus thinks of all metrics."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from chiffon import PlannerClient
from chiffon.embedded.children import free_port
from chiffon.errors import AddressUnavailable
from chiffon.observability import health
from chiffon.observability.http import Page, exposing
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures import plain
from tests.fixtures.gateway import samples, serving
from tests.fixtures.heartbeats import update
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

PROJECT = Path(__file__).parents[2]


@asynccontextmanager
async def client(port: int) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as made:
        yield made


def promtool(*arguments: str, given: str = "") -> str:
    """Ask Prometheus's own tool, where there is one; returns its complaints."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("there is no promtool: apt-get install prometheus")
    done = subprocess.run(
        [program, *arguments], input=given, capture_output=True, text=True, timeout=60
    )
    return "" if done.returncode == 0 else f"{done.returncode} {done.stdout}{done.stderr}"


class Scrapes:
    """What the counters of this process gained since the first look: others use them too."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._first: dict[str, float] = {}

    async def begin(self) -> None:
        self._first = samples((await self._http.get("/metrics")).text)

    async def gained(self, name: str) -> float:
        now = samples((await self._http.get("/metrics")).text)
        return now.get(name, 0) - self._first.get(name, 0)


async def test_an_orchestrator_tells_what_became_of_every_heartbeat(
    broker: str, database_url: str
) -> None:
    """Canaries come every 2 s."""
    port = free_port()
    async with (
        orchestrating(broker, database_url, metrics_port=port),
        client(port) as http,
        plain.channel(broker) as channel,
    ):
        scrapes = Scrapes(http)
        await scrapes.begin()
        one = update(sequence=2)
        key = f"heartbeat.default.desktop.{one.agent_id}"
        for sent in (one, one, one.model_copy(update={"sequence": 1})):
            body = sent.model_dump_json().encode()
            await plain.publish(channel, "chiffon.heartbeats", key, body, "status_update.v1")
        await plain.publish(channel, "chiffon.heartbeats", key, b"{", "status_update.v1")

        outcomes: list[float] = []

        async def are_counted() -> bool:
            outcomes[:] = [
                await scrapes.gained(f"chiffon_heartbeats_{name}_total")
                for name in ("recorded", "stale", "superseded", "dead_lettered")
            ]
            return sum(outcomes) == 4

        await until(are_counted, "what became of four heartbeats")
        assert await scrapes.gained("chiffon_heartbeats_received_total") == 4
        # Two batches may be in work: the older heartbeat is stale, or was recorded before.
        assert outcomes[0] in (1, 2)
        assert outcomes[3] == 1

        async with PlannerClient.open(broker) as planner:
            await planner.find()
        asked = 'chiffon_questions_total{outcome="answered",type="capacity.find.v1"}'
        assert await scrapes.gained(asked) == 1

        async def is_proven() -> bool:
            return await scrapes.gained("chiffon_ingest_path_seconds_count") > 0

        await until(is_proven, "a canary that went the whole way")
        text = (await http.get("/metrics")).text
        assert samples(text)['chiffon_agents{status="online"}'] == 1
        assert 'chiffon_connections_made_total{use="consumes chiffon.ingest"} 1.0' in text
        assert str(one.agent_id) not in text, "series of agents are the gateway's"
        assert promtool("check", "metrics", given=text) == ""


async def test_an_orchestrator_is_ready_while_it_consumes(broker: str, database_url: str) -> None:
    port = free_port()
    async with orchestrating(broker, database_url, metrics_port=port), client(port) as http:
        ready = await http.get("/readyz?verbose")
        assert (ready.status_code, ready.text.splitlines()) == (
            200,
            [
                "[+]broker ok",
                "[+]consumer ok",
                "[+]questions ok",
                "[+]database ok",
                "[+]migrations ok",
                "readyz check passed",
            ],
        )
        assert (await http.get("/livez")).text == "ok\n"
        head = await http.head("/livez")
        assert (head.status_code, head.content) == (200, b"")
        nothing = await http.get("/elsewhere")
        assert (nothing.status_code, nothing.text) == (
            404,
            "there is /livez, /readyz, /metrics\n",
        )


def start_agent(**variables: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "chiffon.agent"],
        env={**os.environ, **variables},
        stderr=subprocess.DEVNULL,
    )


async def test_an_agent_tells_of_its_heartbeats(broker: str, tmp_path: Path) -> None:
    port = free_port()
    process = start_agent(
        CHIFFON_AMQP_URL=broker, CHIFFON_STATE_DIR=str(tmp_path), CHIFFON_METRICS_PORT=str(port)
    )
    try:
        async with client(port) as http:

            async def is_ready() -> bool:
                try:
                    return (await http.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(is_ready, "a confirmed heartbeat")
            assert (await http.get("/readyz?verbose")).text.splitlines() == [
                "[+]broker ok",
                "[+]heartbeats ok",
                "readyz check passed",
            ]
            text = (await http.get("/metrics")).text
            assert samples(text)["chiffon_agent_heartbeats_confirmed_total"] >= 1
            assert promtool("check", "metrics", given=text) == ""
    finally:
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 30) == 0


async def test_prometheus_is_content_with_the_gateway_and_the_rules(
    broker: str, database_url: str, registry: Registry
) -> None:
    await registry.heartbeats.record([Received(update(), asyncio.get_running_loop().time())])
    async with serving(broker, database_url) as http:
        await http.get("/api/v1/agents")
        text = (await http.get("/metrics")).text
    assert promtool("check", "metrics", given=text) == ""

    rules = PROJECT / "deploy/prometheus/chiffon.rules.yml"
    assert promtool("check", "rules", str(rules)) == ""


async def test_every_metric_that_the_rules_name_is_there(broker: str, database_url: str) -> None:
    rules = (PROJECT / "deploy/prometheus/chiffon.rules.yml").read_text()
    words = {word.strip("(){}[],=<>;`") for word in rules.replace("(", " ").split()}
    named = {word.partition("[")[0] for word in words if word.startswith("chiffon_")}
    port = free_port()
    async with orchestrating(broker, database_url, metrics_port=port), client(port) as http:
        text = (await http.get("/metrics")).text

    assert len(named) >= 6
    assert [name for name in named if name not in text] == []


async def test_a_loop_that_does_not_turn_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiffon.observability.http.ANSWER_SECONDS", 0.2)

    async def hangs(_: bool) -> Page:
        await asyncio.Event().wait()
        raise AssertionError

    async with exposing("127.0.0.1", 0, {"/livez": hangs}) as port, client(port) as http:
        answer = await http.get("/livez")

    assert (answer.status_code, answer.text) == (503, "no answer within 0.2 s\n")


async def test_a_port_that_was_scraped_can_be_listened_on_again_at_once() -> None:
    async with exposing("127.0.0.1", 0, {"/livez": health.livez}) as port, client(port) as http:
        assert (await http.get("/livez")).status_code == 200
    async with exposing("127.0.0.1", port, {"/livez": health.livez}), client(port) as http:
        assert (await http.get("/livez")).status_code == 200


async def test_an_address_of_ip_version_6_is_served() -> None:
    async with (
        exposing("::1", 0, {"/livez": health.livez}) as port,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        assert (await http.get(f"http://[::1]:{port}/livez")).text == "ok\n"


async def test_a_port_that_is_taken_is_said_to_be() -> None:
    async with exposing("127.0.0.1", 0, {}) as port:
        with pytest.raises(AddressUnavailable, match=r"CHIFFON_METRICS_PORT: cannot listen"):
            async with exposing("127.0.0.1", port, {}):
                pass
