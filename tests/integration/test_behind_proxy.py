"""A gateway behind a proxy that shows it under a path and strips that."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from chiffon.errors import BadConfiguration
from chiffon.registry.registry import Registry
from tests.fixtures import gateway
from tests.fixtures.heartbeats import update
from tests.fixtures.nginx import needs_nginx, proxying
from tests.fixtures.rooms import record


@pytest.fixture
async def shown(broker: str, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of nginx, which shows the gateway under /chiffon/."""
    async with (
        gateway.serving(
            broker, database_url, http_root_path="/chiffon", http_trusted_proxies=["127.0.0.1"]
        ) as direct,
        proxying(direct.base_url.port or 0) as url,
        httpx.AsyncClient(base_url=f"{url}/chiffon", trust_env=False, timeout=30) as client,
    ):
        yield client


@needs_nginx
async def test_page_files_api_and_description_are_under_the_path(
    shown: httpx.AsyncClient, registry: Registry
) -> None:
    one = update()
    await record(registry, one)

    page = await shown.get("/")
    script = await shown.get("/static/main.js")
    agents = (await shown.get("/api/v1/agents")).json()["agents"]
    described = (await shown.get("/openapi.json")).json()

    assert page.status_code == 200
    assert 'src="static/main.js"' in page.text
    assert 'href="/' not in page.text
    assert script.headers["content-type"].startswith("text/javascript")
    assert [agent["agent_id"] for agent in agents] == [str(one.agent_id)]
    assert described["servers"] == [{"url": "/chiffon"}]
    assert "/api/v1/agents" in described["paths"]


@needs_nginx
async def test_the_stream_is_passed_on_as_it_comes(shown: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20), shown.stream("GET", "/stream") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: fleet"):
                break
        else:
            pytest.fail("it ended")


@needs_nginx
async def test_redirects_stay_under_the_path_whatever_the_host(shown: httpx.AsyncClient) -> None:
    answer = await shown.get("/api/v1/agents/", headers={"Host": "elsewhere.example"})

    assert answer.status_code == 307
    assert answer.headers["location"] == "/chiffon/api/v1/agents"


GOTTEN = [
    *("/", "/static/main.js", "/livez", "/readyz", "/metrics", "/openapi.json"),
    *("/api/v1/agents", "/api/v1/fleet", "/api/v1/reservations", "/api/v1/capacity"),
    *("/api/v1/agents/available-capacity", f"/api/v1/agents/{uuid4()}", "/stream"),
]


async def test_head_is_answered_wherever_get_is(broker: str, database_url: str) -> None:
    async with gateway.serving(broker, database_url) as http:
        for path in GOTTEN:
            head = await http.head(path)
            assert head.content == b"", path
            if path == "/stream":
                assert head.status_code == 200
                continue
            got = await http.get(path)
            assert head.status_code == got.status_code, path
            assert head.headers["content-type"] == got.headers["content-type"], path
        refused = await http.delete("/api/v1/agents")
        assert refused.headers["allow"] == "GET, HEAD"
        followers = gateway.samples((await http.get("/metrics")).text)["chiffon_page_followers"]
        assert followers == 0


async def test_only_a_trusted_proxy_is_believed(broker: str, database_url: str) -> None:
    said = {"X-Forwarded-Prefix": "/elsewhere", "X-Forwarded-Host": "rig.example"}
    async with gateway.serving(
        broker,
        database_url,
        http_trusted_proxies=["127.0.0.0/8"],
        http_allowed_hosts=["rig.example"],
    ) as http:
        believed = await http.get("/api/v1/agents/", headers=said)
    async with gateway.serving(
        broker, database_url, http_trusted_proxies=["10.0.0.0/8"], http_allowed_hosts=["127.0.0.1"]
    ) as http:
        not_believed = await http.get("/api/v1/agents/", headers=said)

    assert believed.headers["location"] == "/elsewhere/api/v1/agents"
    assert not_believed.headers["location"] == "/api/v1/agents"


async def test_a_proxy_that_is_no_address_is_refused(broker: str, database_url: str) -> None:
    with pytest.raises(BadConfiguration, match="CHIFFON_HTTP_TRUSTED_PROXIES"):
        async with gateway.serving(broker, database_url, http_trusted_proxies=["nginx"]):
            pass


async def test_a_connection_is_kept_for_as_long_as_it_is_set(
    broker: str, database_url: str
) -> None:
    async with gateway.serving(broker, database_url, http_keep_alive_seconds=1) as http:
        port = http.base_url.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.read()).endswith(b"ok\n")  # until it is closed
        writer.close()
