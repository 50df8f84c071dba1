"""A consumer that is dead on an open connection: the broker knows, the client does not."""

import asyncio

import pytest

from chiffon.contract.codec import encode, routing_key
from chiffon.errors import ConsumerStuck
from chiffon.orchestrator import process as orchestrator
from chiffon.orchestrator import watchdog
from chiffon.orchestrator.ingest import Ingest
from chiffon.orchestrator.watchdog import Watchdog
from chiffon.registry.registry import Registry
from tests.fixtures import plain
from tests.fixtures.heartbeats import update
from tests.fixtures.system import consumers, orchestrating, settings
from tests.fixtures.waiting import until


@pytest.fixture
def ingests(monkeypatch: pytest.MonkeyPatch) -> list[Ingest]:
    """Every ingest that is watched."""
    found: list[Ingest] = []
    original = Watchdog.__init__

    def remember(self: Watchdog, ingest: Ingest, *rest: object) -> None:
        found.append(ingest)
        original(self, ingest, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Watchdog, "__init__", remember)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "IDLE_SECONDS", 1.0)
    return found


async def deafen(ingest: Ingest) -> None:
    """End the consumer at the broker, and let ingest believe that it is still there."""
    assert ingest._consumer is not None
    await ingest._consumer.cancel()
    assert ingest.is_attached


async def test_a_consumer_that_the_broker_does_not_see_is_started_anew(
    amqp_url: str, database_url: str, registry: Registry, ingests: list[Ingest]
) -> None:
    one = update()
    async with orchestrating(amqp_url, database_url):
        await deafen(ingests[0])

        async def is_deaf() -> bool:
            return await consumers(amqp_url, "chiffon.ingest") == 0

        await until(is_deaf, "the fault: the broker sees no consumer")
        async with plain.channel(amqp_url) as to:
            await plain.publish(
                to, "chiffon.heartbeats", routing_key(one), encode(one), "status_update.v1"
            )

        async def is_recorded() -> bool:
            return await registry.agents.show(one.agent_id) is not None

        await until(is_recorded, "the heartbeat that waited")
        assert await consumers(amqp_url, "chiffon.ingest") == 1


async def test_messages_that_wait_and_are_not_delivered_are_noticed_beside_other_consumers(
    amqp_url: str, database_url: str, registry: Registry, ingests: list[Ingest]
) -> None:
    """Somebody else's consumer that takes nothing keeps the broker's count above zero.

    The watchdog looks every 2 s.
    """
    async with orchestrating(amqp_url, database_url), plain.channel(amqp_url) as other:
        await deafen(ingests[0])
        await other.set_qos(prefetch_count=1)
        queue = await other.get_queue("chiffon.ingest")
        taken = asyncio.Event()

        async def keep(_: object) -> None:
            taken.set()

        await queue.consume(keep)
        await taken.wait()  # a canary; it takes no other until it acknowledges this one
        assert await consumers(amqp_url, "chiffon.ingest") == 1

        async def both() -> bool:
            return await consumers(amqp_url, "chiffon.ingest") == 2

        await until(both, "our consumer beside the other")


async def test_a_consumer_that_no_fresh_connection_helps_ends_the_process(
    amqp_url: str, database_url: str, ingests: list[Ingest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three connections are tried, a second each."""

    async def blind(*_: object) -> tuple[int, int]:
        return 5, 0

    monkeypatch.setattr(watchdog, "_counts", blind)

    monkeypatch.setattr(watchdog, "IDLE_SECONDS", 0.1)  # canaries come every 2 s
    serving = orchestrator.serve(settings(amqp_url, database_url), asyncio.Event())

    with pytest.raises(ConsumerStuck, match=r"sees no consumer .* after 3 fresh connections"):
        async with asyncio.timeout(60):
            await serving
