"""What a person mends needs no restart of ours, and no second command."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import httpx
import pytest

from chiffon import PlannerClient
from chiffon.embedded.children import free_port
from chiffon.errors import CapacityError
from chiffon.orchestrator import process as orchestrator
from chiffon.planner import events as planner_events
from chiffon.planner.events import following
from chiffon.registry import migrations
from chiffon.registry.registry import Registry
from tests.fixtures import gateway, plain
from tests.fixtures.command import started
from tests.fixtures.heartbeats import update
from tests.fixtures.plain import Queues
from tests.fixtures.servers import Management, Servers, execute
from tests.fixtures.system import consumers, orchestrating, settings
from tests.fixtures.waiting import until


def as_user(url: str, user: str) -> str:
    parts = urlsplit(url)
    netloc = f"{user}:secret@{parts.hostname}:{parts.port}"
    return parts._replace(netloc=netloc).geturl()


async def test_an_agent_whose_user_is_made_later_speaks_then(
    broker: str, management: Management, queues: Queues, tmp_path: Path
) -> None:
    user = f"later-{uuid4().hex[:8]}"
    vhost = quote(urlsplit(broker).path[1:])
    with started(
        *("-m", "chiffon.agent"),
        CHIFFON_AMQP_URL=as_user(broker, user),
        CHIFFON_STATE_DIR=str(tmp_path),
    ) as agent:
        await agent.says(f"refused user '{user}'")
        management.call("PUT", f"users/{user}", {"password": "secret", "tags": ""})
        try:
            rights = {"configure": "", "write": ".*", "read": ".*"}
            management.call("PUT", f"permissions/{vhost}/{user}", rights)

            async def speaks() -> Any:
                return queues.take("chiffon.ingest", 1)

            [heartbeat] = await until(speaks, "a heartbeat", 60)
            assert json.loads(heartbeat["payload"])["status"] == "online"
        finally:
            management.call("DELETE", f"users/{user}")


async def test_an_agent_whose_state_folder_is_mended_later_starts_then(
    broker: str, queues: Queues, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "state"
    in_the_way.touch()
    with started(
        *("-m", "chiffon.agent"), CHIFFON_AMQP_URL=broker, CHIFFON_STATE_DIR=str(in_the_way)
    ) as agent:
        await agent.says("no agent without its identity, waiting: the state folder")
        in_the_way.unlink()

        async def speaks() -> Any:
            return queues.take("chiffon.ingest", 1)

        [heartbeat] = await until(speaks, "a heartbeat")

    kept = json.loads((in_the_way / "agent.json").read_text())
    assert json.loads(heartbeat["payload"])["agent_id"] == kept["agent_id"]


async def test_a_full_disk_at_its_start_makes_no_other_agent(
    broker: str, queues: Queues, tmp_path: Path
) -> None:
    agent_id = str(uuid4())
    kept = json.dumps({"agent_id": agent_id, "incarnation": 1_000})
    (tmp_path / "agent.json").write_text(kept)
    (tmp_path / "agent.new").mkdir()  # what is written first cannot be written
    with started(
        *("-m", "chiffon.agent"), CHIFFON_AMQP_URL=broker, CHIFFON_STATE_DIR=str(tmp_path)
    ) as agent:
        await agent.says("cannot be written")

        async def speaks() -> Any:
            return queues.take("chiffon.ingest", 1)

        [heartbeat] = await until(speaks, "a heartbeat")

    said = json.loads(heartbeat["payload"])
    assert said["agent_id"] == agent_id
    assert said["incarnation"] > 1_000
    assert (tmp_path / "agent.json").read_text() == kept


async def test_an_orchestrator_waits_for_database_user_tables_and_broker(
    servers: Servers, broker: str, management: Management, empty_database_url: str
) -> None:
    role = f"later_{uuid4().hex[:8]}"
    vhost = quote(urlsplit(broker).path[1:])
    port = free_port()
    stopped = asyncio.Event()
    database_url = as_user(empty_database_url, role)
    serving = asyncio.create_task(
        orchestrator.serve(
            settings(as_user(broker, role), database_url, metrics_port=port), stopped
        )
    )

    async def is_ready(*failed: str) -> bool:
        assert not serving.done()
        async with httpx.AsyncClient(trust_env=False) as http:
            try:
                said = (await http.get(f"http://127.0.0.1:{port}/readyz?verbose")).text
            except httpx.TransportError:
                return False
        return all(f"[-]{one} failed" in said for one in failed) and (
            bool(failed) or "check passed" in said
        )

    try:
        await until(lambda: is_ready("start", "database", "migrations"), "it says what it lacks")
        await execute(servers.database_url, f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'secret'")
        await migrations.upgrade(database_url)
        management.call("PUT", f"users/{role}", {"password": "secret", "tags": ""})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        management.call("PUT", f"permissions/{vhost}/{role}", everything)
        await until(is_ready, "it is ready")
        assert await consumers(broker, "chiffon.ingest") == 1
    finally:
        stopped.set()
        await serving
        management.call("DELETE", f"users/{role}")
        await execute(empty_database_url, f"REASSIGN OWNED BY {role} TO CURRENT_USER")
        await execute(empty_database_url, f"DROP OWNED BY {role}")
        await execute(servers.database_url, f"DROP ROLE {role}")


OBJECTS = [
    ("exchanges", "chiffon.heartbeats"),
    ("exchanges", "chiffon.rpc"),
    ("exchanges", "chiffon.events"),
    ("exchanges", "chiffon.replies"),
    ("exchanges", "chiffon.dead-letters"),
    ("queues", "chiffon.ingest"),
    ("queues", "chiffon.capacity"),
    ("queues", "chiffon.dead-letters"),
]


@pytest.mark.parametrize(("kind", "name"), OBJECTS)
async def test_what_somebody_deletes_is_made_again(
    broker: str,
    database_url: str,
    registry: Registry,
    management: Management,
    queues: Queues,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
) -> None:
    """All of it is in use: heartbeats, questions, events to somebody who follows, dead letters."""
    vhost = quote(urlsplit(broker).path[1:])
    speaker, numbers = uuid4(), itertools.count(1)
    monkeypatch.setattr(orchestrator, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(planner_events, "REBIND_SECONDS", 0.5)
    async with (
        orchestrating(broker, database_url),
        PlannerClient.open(broker) as planner,
        following(broker, name="test") as events,
    ):
        management.call("DELETE", f"{kind}/{vhost}/{name}")
        told: list[object] = []
        listening = asyncio.create_task(listen(events, told))

        async def is_recorded() -> Any:
            """Say it again and again: what is sent while there is no exchange is nobody's."""
            number = next(numbers)
            one = update(speaker, sequence=number, status="busy" if number % 2 else "online")
            key = f"heartbeat.default.desktop.{one.agent_id}"
            try:
                async with plain.channel(broker) as to:
                    body = one.model_dump_json().encode()
                    await plain.publish(to, "chiffon.heartbeats", key, body, "status_update.v1")
                    await plain.publish(to, "chiffon.heartbeats", key, b"{", "status_update.v1")
            except plain.REFUSED:
                return None
            return await registry.agents.show(speaker)

        async def is_answered() -> bool:
            try:
                return (await planner.show(speaker, timeout=2)).agent_id == speaker
            except CapacityError:
                return False

        async def is_set_aside() -> Any:
            await is_recorded()
            is_there = "chiffon.dead-letters" in queues.names()
            return is_there and queues.take("chiffon.dead-letters")

        async def is_told() -> bool:
            await is_recorded()
            return bool(told)

        await until(is_recorded, f"heartbeats are recorded without {name}")
        await until(is_answered, f"questions are answered without {name}")
        await until(is_set_aside, f"what is refused is set aside without {name}")
        told.clear()
        await until(is_told, f"events arrive without {name}")
        assert name in queues.names() or kind == "exchanges"
        listening.cancel()


async def listen(events: AsyncIterator[object], told: list[object]) -> None:
    async for event in events:
        told.append(event)


async def test_a_database_that_takes_no_writes_is_not_ready_and_needs_no_restart(
    servers: Servers, broker: str, database_url: str, registry: Registry
) -> None:
    """A ``SELECT 1`` works all the while."""
    name, port = urlsplit(database_url).path[1:], free_port()
    read_only = f"ALTER DATABASE {name} SET default_transaction_read_only"
    ended = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        f" WHERE datname = '{name}' AND application_name = 'chiffon'"
    )
    one = update()
    async with (
        orchestrating(broker, database_url, metrics_port=port),
        gateway.serving(broker, database_url) as http,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as orchestrator_,
        plain.channel(broker) as to,
    ):

        async def are_ready() -> bool:
            answers = [await each.get("/readyz?verbose") for each in (http, orchestrator_)]
            return all(answer.status_code == 200 for answer in answers)

        async def are_not_ready() -> bool:
            answers = [await each.get("/readyz?verbose") for each in (http, orchestrator_)]
            return all("[-]database failed" in answer.text for answer in answers) and all(
                "read-only" in answer.text for answer in answers
            )

        await until(are_ready, "both are ready")
        await execute(servers.database_url, f"{read_only} = on")
        await execute(servers.database_url, ended)
        await until(are_not_ready, "both say that the database takes no writes")
        body, key = one.model_dump_json().encode(), f"heartbeat.default.desktop.{one.agent_id}"
        await plain.publish(to, "chiffon.heartbeats", key, body, "status_update.v1")
        await execute(servers.database_url, f"{read_only} = off")

        async def is_recorded() -> bool:
            return await registry.agents.show(one.agent_id) is not None

        await until(is_recorded, "the heartbeat that waited is recorded")
        await until(are_ready, "both are ready again")
