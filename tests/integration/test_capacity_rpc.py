"""Questions over AMQP: planner and responder, and what may go wrong between them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import aio_pika
import pytest

from chiffon import PlannerClient
from chiffon.contract import topology
from chiffon.contract.messages import CapacityQuery
from chiffon.errors import (
    AgentNotFoundError,
    BusRefused,
    BusUnavailable,
    CapacityRefused,
    CapacityTimeout,
    NoResponders,
)
from chiffon.registry.registry import Registry
from chiffon.registry.rows import Received
from tests.fixtures import plain
from tests.fixtures.caller import Caller
from tests.fixtures.heartbeats import RESOURCES, update
from tests.fixtures.plain import Queues
from tests.fixtures.servers import Management, Servers, execute, new_database
from tests.fixtures.system import consumers, orchestrating
from tests.fixtures.waiting import until


@pytest.fixture
async def serving(amqp_url: str, database_url: str) -> AsyncIterator[str]:
    """An orchestrator that answers on this virtual host."""
    async with orchestrating(amqp_url, database_url):
        yield amqp_url


@pytest.fixture
async def planner(serving: str) -> AsyncIterator[PlannerClient]:
    async with PlannerClient.open(serving) as opened:
        yield opened


async def record(registry: Registry, *updates: Any) -> None:
    receipts = [Received(one, time.monotonic()) for one in updates]
    await registry.heartbeats.record(sorted(receipts, key=lambda one: one.update.agent_id))


@pytest.fixture
async def caller(serving: str) -> AsyncIterator[Caller]:
    async with plain.channel(serving) as channel:
        yield Caller(channel, await channel.declare_queue(exclusive=True))


async def test_find_answers_with_offers_best_first(
    planner: PlannerClient, registry: Registry
) -> None:
    small = update(resources={"gpu_vram_available_gb": 8.0})
    large = update(resources={"gpu_vram_available_gb": 24.0})
    await record(registry, small, large, update(status="busy"), update(status="offline"))

    offers = await planner.find(CapacityQuery(min_gpu_vram_gb=4))

    assert [offer.agent_id for offer in offers.agents] == [large.agent_id, small.agent_id]
    assert (offers.total_matches, offers.total_relation) == (2, "eq")
    [best, _] = offers.agents
    assert (best.hostname, best.status, best.gpu_vram_available_gb) == ("rig-7", "online", 24.0)
    assert 0 <= best.heartbeat_age_seconds < 10


@pytest.mark.parametrize(
    ("kind", "body", "named"),
    [
        ("capacity.find.v1", {"min_gpu_vram": 999}, "min_gpu_vram; did you mean min_gpu_vram_gb?"),
        ("capacity.wait.v1", {"timeout": 1}, "timeout; did you mean timeout_seconds?"),
        ("capacity.show.v1", {"agent": "x"}, "agent; did you mean agent_id?"),
        ("capacity.reserve.v1", {"memory": 1}, "memory; did you mean memory_gb?"),
        ("capacity.renew.v1", {"lease": 1}, "lease; did you mean lease_seconds?"),
        ("capacity.release.v1", {"id": 1}, "id"),
        ("capacity.reservation.show.v1", {"id": 1}, "id"),
        ("capacity.reservation.list.v1", {"holders": "me"}, "holders; did you mean holder?"),
    ],
)
async def test_a_misspelt_field_of_a_request_is_refused_by_name(
    caller: Caller, kind: str, body: dict[str, Any], named: str
) -> None:
    answer = json.loads((await caller.ask(kind, body)).body)

    assert answer["code"] == "invalid_request"
    assert answer["message"].startswith(f"unknown field {named}")


def test_a_misspelt_field_is_refused_in_a_program_too() -> None:
    misspelt: Any = {"min_vram": 3}
    with pytest.raises(ValueError, match="unknown field min_vram; did you mean min_gpu_vram_gb"):
        CapacityQuery(**misspelt)


async def test_whole_numbers_may_be_written_with_a_point(
    caller: Caller, registry: Registry
) -> None:
    await record(registry, update(resources={"cpu_cores_available": 4}))
    deadline = float(int(time.time() * 1_000) + 60_000)

    answer = await caller.ask(
        "capacity.find.v1", {"min_cpu_cores": 4.0, "limit": 1.0}, headers={"x-deadline": deadline}
    )

    assert len(json.loads(answer.body)["agents"]) == 1


async def test_more_matches_than_the_limit_are_said_to_be_more(
    planner: PlannerClient, registry: Registry
) -> None:
    await record(registry, *(update() for _ in range(5)))

    some = await planner.find(CapacityQuery(limit=3))
    explained = await planner.find(CapacityQuery(limit=3, explain=True))

    assert (len(some.agents), some.total_matches, some.total_relation) == (3, 3, "gte")
    assert (len(explained.agents), explained.total_matches, explained.total_relation) == (
        3,
        5,
        "eq",
    )


async def test_show_answers_with_one_agents_metrics(
    planner: PlannerClient, registry: Registry
) -> None:
    sent = update()
    await record(registry, sent)

    answer = await planner.show(sent.agent_id)

    assert {name: getattr(answer, name) for name in RESOURCES} == RESOURCES
    assert answer.timestamp is not None


async def test_an_unknown_agent_is_the_same_error_as_from_the_service(
    planner: PlannerClient,
) -> None:
    with pytest.raises(AgentNotFoundError):
        await planner.show(uuid4())


async def test_many_questions_at_once_each_get_their_own_answer(
    planner: PlannerClient, registry: Registry
) -> None:
    agents = [update(pool_name=f"pool-{number}") for number in range(50)]
    await record(registry, *agents)

    answers = await asyncio.gather(
        *(planner.find(CapacityQuery(pool_name=agent.pool_name), timeout=20) for agent in agents)
    )

    found = [[offer.agent_id for offer in answer.agents] for answer in answers]
    assert found == [[agent.agent_id] for agent in agents]


async def test_nobody_listening_is_known_at_once(broker: str) -> None:
    async with PlannerClient.open(broker) as planner:
        # Had it waited, it would be a CapacityTimeout.
        with pytest.raises(NoResponders, match="is an orchestrator running"):
            await planner.find(timeout=30)


async def test_a_broker_that_no_orchestrator_ever_saw_is_said_to_be_that(amqp_url: str) -> None:
    async with PlannerClient.open(amqp_url) as planner:
        with pytest.raises(NoResponders, match=r"exchange chiffon\.rpc is not there yet"):
            await planner.find(timeout=1)


async def test_a_responder_that_does_not_answer_is_a_timeout(broker: str) -> None:
    async with plain.channel(broker) as channel:
        queue = await channel.declare_queue("chiffon.capacity")
        await queue.bind("chiffon.rpc", "capacity")
        async with PlannerClient.open(broker) as planner:
            with pytest.raises(CapacityTimeout, match=r"no answer within 0\.5 s"):
                await planner.find(timeout=0.5)


async def test_a_broker_that_is_away_is_neither_of_both() -> None:
    async with PlannerClient.open("amqp://u:p@127.0.0.1:1/") as planner:
        with pytest.raises(BusUnavailable, match=r"cannot reach the broker at 127\.0\.0\.1:1"):
            await planner.find(timeout=1)


async def test_a_refused_planner_is_told_at_once(amqp_url: str) -> None:
    wrong = f"amqp://bob:hunter2@{amqp_url.partition('@')[2]}"
    async with PlannerClient.open(wrong) as planner:
        with pytest.raises(BusRefused, match="refused user 'bob'"):
            await planner.find(timeout=30)


@contextmanager
def user(management: Management, amqp_url: str, **rights: str) -> Iterator[str]:
    """A user of the virtual host with these rights and no others."""
    vhost = amqp_url.rpartition("/")[2]
    name = f"user-{uuid4().hex[:8]}"
    management.call("PUT", f"users/{name}", {"password": "pw", "tags": ""})
    allowed = {"configure": ".*", "write": ".*", "read": ".*", **rights}
    management.call("PUT", f"permissions/{vhost}/{name}", allowed)
    try:
        yield f"amqp://{name}:pw@{amqp_url.partition('@')[2]}"
    finally:
        management.call("DELETE", f"users/{name}")


async def test_a_planner_that_may_not_ask_is_told_so_at_once(
    serving: str, management: Management
) -> None:
    with user(management, serving, write="^amq\\.gen-") as url:
        async with PlannerClient.open(url) as planner:
            with pytest.raises(BusRefused, match="ACCESS_REFUSED"):
                await planner.find(timeout=30)


async def test_a_responder_that_may_not_write_to_the_default_exchange_goes_on(
    amqp_url: str, database_url: str, management: Management, caplog: pytest.LogCaptureFixture
) -> None:
    """Its answers' connection is lost each time; ingest, canary and later answers are not."""
    with user(management, amqp_url, write="^chiffon\\.") as limited:
        async with orchestrating(limited, database_url), plain.channel(amqp_url) as channel:
            queue = await channel.declare_queue(exclusive=True)
            await queue.bind("chiffon.replies", "p")

            async def ask(reply_to: str) -> None:
                await plain.publish(
                    channel, "chiffon.rpc", "capacity", {}, "capacity.find.v1", reply_to=reply_to
                )

            for _ in range(3):
                await ask("amq.gen-x")

            async def answered() -> Any:
                await ask("/exchanges/chiffon.replies/p")
                await asyncio.sleep(0.2)
                return await queue.get(fail=False, no_ack=True)

            assert (await until(answered, "an answer")).type == "capacity.offers.v1"

    assert "ACCESS_REFUSED" in caplog.text, "the fault was not injected"
    assert "no canary" not in caplog.text


async def test_a_cut_connection_between_questions_is_not_noticed(
    planner: PlannerClient, management: Management, amqp_url: str
) -> None:
    """The broker lists a new connection after a second, and only then can it be cut."""
    await planner.find()
    await plain.cut(management, amqp_url, "planner")

    await planner.find(timeout=20)


async def test_a_question_that_is_open_when_the_line_is_cut_is_asked_again(
    broker: str, management: Management, amqp_url: str, database_url: str
) -> None:
    """Nobody answers the first time; after the cut there is an orchestrator."""
    async with plain.channel(broker) as channel, PlannerClient.open(broker) as planner:
        silent = await channel.declare_queue("chiffon.capacity")
        await silent.bind("chiffon.rpc", "capacity")
        asking = asyncio.create_task(planner.find(timeout=30))

        async def asked() -> bool:
            return (await plain.depth(broker, "chiffon.capacity"))[0] == 1

        await until(asked, "the question in the queue")
        await silent.delete(if_unused=False, if_empty=False)
        async with orchestrating(amqp_url, database_url):
            assert not asking.done()
            await plain.cut(management, amqp_url, "planner")

            answer = await asking

    assert answer.agents == []


async def test_a_question_that_one_of_two_queues_takes_is_answered(
    planner: PlannerClient, serving: str
) -> None:
    async with plain.full_queue(serving, "chiffon.rpc", "capacity"):
        assert (await planner.find(timeout=20)).agents == []


async def test_a_question_that_no_queue_takes_is_asked_again(
    broker: str, amqp_url: str, database_url: str
) -> None:
    """It is asked again after half a second, until somebody listens."""
    async with (
        plain.full_queue(broker, "chiffon.rpc", "capacity"),
        PlannerClient.open(broker) as planner,
    ):
        with pytest.raises(CapacityTimeout):
            await planner.find(timeout=1.5)
        asking = asyncio.create_task(planner.find(timeout=30))
        async with orchestrating(amqp_url, database_url):
            assert (await asking).agents == []


async def test_an_unknown_question_gets_an_answer_that_says_so(caller: Caller) -> None:
    assert await caller.refusal("capacity.guess.v1", {}) == "unsupported_type"
    assert await caller.refusal(None, {}) == "unsupported_type"


BAD_QUESTIONS: list[Any] = [
    b"",
    b"not json",
    [],
    {"limit": 0},
    {"min_gpu_vram_gb": -1},
    {"min_cpu_cores": 1.5},
    {"agent_type": "toaster"},
    b'{"min_gpu_vram_gb": NaN}',
    b" " * 65_537,
]


async def test_a_bad_question_gets_an_answer_that_says_why(caller: Caller) -> None:
    codes = [await caller.refusal("capacity.find.v1", body) for body in BAD_QUESTIONS]

    assert codes == ["invalid_request"] * len(BAD_QUESTIONS)


async def test_show_of_an_unknown_agent_names_it(caller: Caller) -> None:
    unknown = str(uuid4())

    message = await caller.ask("capacity.show.v1", {"agent_id": unknown})

    answer = json.loads(message.body)
    assert (answer["code"], answer["details"]) == ("agent_not_found", {"agent_id": unknown})


async def test_a_deadline_that_has_passed_is_answered_with_both_clocks(caller: Caller) -> None:
    past = int(time.time() * 1_000) - 5_000

    message = await caller.ask("capacity.find.v1", {}, headers={"x-deadline": past})

    answer = json.loads(message.body)
    assert answer["code"] == "expired"
    assert str(past) in answer["message"]
    assert answer["message"].count(str(past)[:5]) == 2, "the responder's clock is named too"


async def test_a_deadline_that_is_no_time_is_a_bad_question(caller: Caller) -> None:
    assert (
        await caller.refusal("capacity.find.v1", {}, headers={"x-deadline": "soon"})
        == "invalid_request"
    )


async def test_a_question_that_names_no_fit_place_for_its_answer_is_set_aside(
    serving: str, queues: Queues
) -> None:
    places = [None, "chiffon.ingest", "/exchanges/chiffon.heartbeats/x"]
    async with plain.channel(serving) as channel:
        for reply_to in places:
            await plain.publish(
                channel, "chiffon.rpc", "capacity", {}, "capacity.find.v1", reply_to=reply_to
            )

        async def are_dead() -> bool:
            return (await plain.depth(serving, "chiffon.dead-letters"))[0] == len(places)

        await until(are_dead, "a dead letter each")

    for dead in queues.take("chiffon.dead-letters"):
        assert "reply_to" in dead["properties"]["headers"]["chiffon-reason"]
    assert queues.take("chiffon.ingest") == []


async def test_an_answer_may_go_by_direct_reply_to(serving: str) -> None:
    async with plain.channel(serving) as channel:
        queue = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        replies: asyncio.Queue[Any] = asyncio.Queue()
        await queue.consume(replies.put, no_ack=True)

        await plain.publish(
            channel,
            "chiffon.rpc",
            "capacity",
            {},
            "capacity.find.v1",
            reply_to="amq.rabbitmq.reply-to",
        )

        async with asyncio.timeout(20):
            assert (await replies.get()).type == "capacity.offers.v1"


async def test_an_answer_may_go_by_the_replies_exchange(serving: str) -> None:
    async with plain.channel(serving) as channel:
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("chiffon.replies", "planner-7")
        caller = Caller(channel, queue)

        message = await caller.ask(
            "capacity.find.v1", {}, reply_to="/exchanges/chiffon.replies/planner-7"
        )

    assert message.type == "capacity.offers.v1"


async def test_an_answer_that_nobody_takes_does_not_harm_the_responder(
    serving: str, caller: Caller
) -> None:
    gone = ["amq.gen-nobody", "amq.rabbitmq.reply-to.nonsense", "/exchanges/chiffon.replies/x"]
    async with plain.channel(serving) as channel:
        for reply_to in gone * 30:
            await plain.publish(
                channel, "chiffon.rpc", "capacity", {}, "capacity.find.v1", reply_to=reply_to
            )

    assert (await caller.ask("capacity.find.v1", {})).type == "capacity.offers.v1"
    assert await consumers(serving, "chiffon.capacity") == 1


async def test_a_database_that_is_away_is_said_to_be_that(amqp_url: str, servers: Servers) -> None:
    async with new_database(servers, migrated=True) as url, orchestrating(amqp_url, url):
        name = url.rpartition("/")[2]
        async with PlannerClient.open(amqp_url) as planner:
            await planner.find()
            await execute(servers.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await execute(
                servers.database_url,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            with pytest.raises(CapacityRefused) as refused:
                await planner.find(timeout=20)
            await execute(servers.database_url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await planner.find(timeout=20)

    assert refused.value.code == "unavailable"


async def test_a_question_that_expired_in_the_queue_is_never_answered(broker: str) -> None:
    async with plain.channel(broker) as channel:
        queue = await channel.declare_queue("chiffon.capacity")
        await queue.bind("chiffon.rpc", "capacity")
        await plain.publish(
            channel,
            "chiffon.rpc",
            "capacity",
            {},
            "capacity.find.v1",
            reply_to="amq.gen-x",
            expiration=0.05,
        )

        async def is_gone() -> bool:
            return (await plain.depth(broker, "chiffon.capacity"))[0] == 0

        await until(is_gone, "the question gone")
        assert await queue.get(fail=False) is None


async def test_the_capacity_queue_goes_with_its_last_responder(
    amqp_url: str, database_url: str
) -> None:
    async with orchestrating(amqp_url, database_url):
        async with orchestrating(amqp_url, database_url):
            assert await consumers(amqp_url, "chiffon.capacity") == 2
        assert await consumers(amqp_url, "chiffon.capacity") == 1

    async with plain.channel(amqp_url) as channel:
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await channel.declare_queue("chiffon.capacity", passive=True)


async def test_two_responders_share_the_questions(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    """Two whole orchestrators start."""
    await record(registry, update())
    async with (
        orchestrating(amqp_url, database_url),
        orchestrating(amqp_url, database_url),
        PlannerClient.open(amqp_url) as planner,
    ):
        answers = await asyncio.gather(*(planner.find(timeout=20) for _ in range(100)))

    assert {len(answer.agents) for answer in answers} == {1}


def test_every_reply_form_is_tested() -> None:
    assert len(topology.REPLY_FORMS) == 3
