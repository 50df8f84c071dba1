"""The topology on a real broker."""

import asyncio
import json
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chiffon.amqp.connection import Connection, dial, dial_any
from chiffon.amqp.declare import Finding, await_exchange, check, declare, ensure
from chiffon.amqp.publisher import Properties, Publisher, publish
from chiffon.amqp.reconnecting import ReconnectingConnection
from chiffon.contract import topology
from chiffon.contract.topology import Topology
from chiffon.errors import BusRefused, BusUnavailable, TopologyMismatch, TopologyMissing, Unroutable
from tests.fixtures.servers import Management, Servers

PROJECT = Path(__file__).parents[2]


async def verdicts(url: str) -> dict[str, Finding]:
    found = await check(lambda: dial_any(url, "test"))
    return {f"{finding.kind} {finding.name}": finding for finding in found}


async def test_declaring_twice_is_the_same_as_once_and_leaves_nothing_to_find(
    broker: str, management: Management
) -> None:
    connection = await dial(broker, "test")
    await declare(connection)
    await connection.close()

    found = await verdicts(broker)

    assert {finding.verdict for finding in found.values()} == {"ok"}
    wanted = Topology.of(1)
    assert len(found) == len(wanted.exchanges) + len(wanted.queues) + len(wanted.bindings)


async def test_checking_an_empty_broker_finds_everything_missing_and_adds_nothing(
    amqp_url: str, management: Management
) -> None:
    found = await verdicts(amqp_url)

    assert {finding.verdict for finding in found.values()} == {"missing"}
    vhost = urlsplit(amqp_url).path[1:]
    assert management.call("GET", f"queues/{vhost}") == []


async def test_a_missing_binding_is_found(broker: str, management: Management) -> None:
    vhost = urlsplit(broker).path[1:]
    path = f"bindings/{vhost}/e/chiffon.heartbeats/q/chiffon.ingest"
    [binding] = management.call("GET", path)
    management.call("DELETE", f"{path}/{binding['properties_key']}")

    found = await verdicts(broker)

    odd = {name: one.verdict for name, one in found.items() if one.verdict != "ok"}
    assert odd == {"binding chiffon.heartbeats -> chiffon.ingest (heartbeat.#)": "missing"}


async def test_a_queue_with_other_arguments_is_found_and_named(amqp_url: str) -> None:
    connection = await dial(amqp_url, "test")
    channel = await connection.channel()
    await channel.queue_declare("chiffon.ingest", durable=True)

    with pytest.raises(TopologyMismatch, match=r"chiffon\.ingest.*chiffon bus check"):
        await declare(connection)
    found = await verdicts(amqp_url)

    assert found["queue chiffon.ingest"].verdict == "different"
    assert "inequivalent arg" in found["queue chiffon.ingest"].detail
    await connection.close()


async def test_who_may_not_declare_checks_that_it_is_there(
    broker: str, amqp_url: str, management: Management
) -> None:
    vhost = urlsplit(broker).path[1:]
    user = f"looker-{vhost}"
    management.call("PUT", f"users/{user}", {"password": "pw", "tags": ""})
    rights = {"configure": "^$", "write": ".*", "read": ".*"}
    management.call("PUT", f"permissions/{vhost}/{user}", rights)
    parts = urlsplit(broker)
    url = parts._replace(netloc=f"{user}:pw@{parts.hostname}:{parts.port}").geturl()
    try:
        await ensure(lambda: dial_any(url, "test"))

        management.call("DELETE", f"exchanges/{vhost}/chiffon.events")
        with pytest.raises(TopologyMissing, match=r"chiffon\.events.*chiffon bus declare"):
            await ensure(lambda: dial_any(url, "test"))
    finally:
        management.call("DELETE", f"users/{user}")


async def test_an_exchange_that_is_not_there_yet_is_waited_for_with_words(amqp_url: str) -> None:
    connection = await dial(amqp_url, "test")

    with pytest.raises(
        TopologyMissing, match="start an orchestrator, or run `chiffon bus declare`"
    ):
        await await_exchange(connection, topology.HEARTBEATS)

    await connection.close()


async def test_a_message_that_no_queue_takes_is_an_error(broker: str) -> None:
    connection = await dial(broker, "test")

    with pytest.raises(Unroutable):
        await publish(
            await connection.channel(),
            b"{}",
            exchange=topology.RPC,
            routing_key="nobody",
            properties=Properties(),
            timeout=5,
        )

    await connection.close()


async def test_a_wrong_password_is_refused_and_not_shown(amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    wrong = parts._replace(netloc=f"bob:hunter2@{parts.hostname}:{parts.port}").geturl()

    with pytest.raises(BusRefused, match="refused user 'bob'") as refused:
        await dial(wrong, "test")

    assert "hunter2" not in str(refused.value)


async def test_an_unknown_virtual_host_is_named(amqp_url: str) -> None:
    with pytest.raises(BusUnavailable, match="would not open virtual host 'nowhere'"):
        await dial(urlsplit(amqp_url)._replace(path="/nowhere").geturl(), "test")


async def test_a_host_that_does_not_speak_amqp_is_said_to_be_that(servers: Servers) -> None:
    """A dial has 3 s."""
    parts = urlsplit(servers.management_url)

    with pytest.raises(BusUnavailable, match=f"{parts.port}"):
        await dial(f"amqp://u:p@127.0.0.1:{parts.port}/", "test")


async def test_a_link_survives_a_bug_in_what_prepares_it(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Connection] = []

    async def prepare(connection: Connection) -> None:
        tries.append(connection)
        if len(tries) == 1:
            raise ZeroDivisionError("oops")

    async with (
        ReconnectingConnection(amqp_url, name="test", prepare=prepare) as link,
        asyncio.timeout(20),
    ):
        assert await link.connection() is tries[1]

    assert "oops" in caplog.text


async def test_a_session_whose_confirms_do_not_come_is_dropped(amqp_url: str) -> None:
    """A host that takes the handshake and then nothing more: a relay that is stopped."""
    parts = urlsplit(amqp_url)
    stopped = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection(parts.hostname, parts.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                if not stopped.is_set():
                    sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, to_there), pump(there, writer), return_exceptions=True)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
    async with ReconnectingConnection(url, name="test") as link:
        connection = await link.connection()
        publisher = Publisher(link)
        # The default exchange and a queue that is there prove that confirms come at first.
        channel = await connection.channel()
        queue = str((await channel.queue_declare("", exclusive=True)).queue)
        send = partial(
            publisher.publish, b"", exchange="", routing_key=queue, properties=Properties()
        )
        await send(timeout=5)
        stopped.set()

        with pytest.raises(BusUnavailable, match=r"not confirmed in time|not published in 0\.5 s"):
            await send(timeout=0.5)

        assert connection.lost.done()
        stopped.clear()
        async with asyncio.timeout(20):
            assert await link.connection() is not connection
    server.close()


async def test_the_second_host_is_used_when_the_first_is_away(amqp_url: str) -> None:
    parts = urlsplit(amqp_url)
    both = parts._replace(
        netloc=f"{parts.username}:{parts.password}@127.0.0.1:1,127.0.0.1:{parts.port}"
    ).geturl()

    connection: Connection = await dial_any(both, "test")

    assert connection.where == f"127.0.0.1:{parts.port}"
    await connection.close()


async def test_a_real_broker_imports_the_definitions_file(
    amqp_url: str, management: Management
) -> None:
    vhost = urlsplit(amqp_url).path[1:]
    file = json.loads((PROJECT / "deploy/rabbitmq/definitions.json").read_text())
    without_vhost = {
        kind: [{k: v for k, v in one.items() if k != "vhost"} for one in file[kind]]
        for kind in ("exchanges", "queues", "bindings")
    }

    management.call("POST", f"definitions/{vhost}", without_vhost)

    assert {finding.verdict for finding in (await verdicts(amqp_url)).values()} == {"ok"}


def test_the_definitions_file_is_the_topology() -> None:
    file = json.loads((PROJECT / "deploy/rabbitmq/definitions.json").read_text())
    expected = topology.definitions("chiffon")

    assert {kind: file[kind] for kind in expected} == expected
