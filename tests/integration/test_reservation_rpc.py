"""Reservations and waiting over AMQP: what is answered, kept, renewed, given back."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon import PlannerClient
from chiffon.capacity.reservations import ReservationService
from chiffon.contract.messages import (
    CapacityQuery,
    CapacityWait,
    ReservationEvent,
    ReservationList,
    ReservationRelease,
    ReservationRenew,
)
from chiffon.errors import (
    CapacityRefused,
    IdempotencyMismatch,
    InsufficientCapacity,
    ReservationNotFound,
    StaleFence,
)
from chiffon.orchestrator.responder import QUESTIONS
from chiffon.planner.held_reservation import usable_seconds
from chiffon.planner.rpc import RpcClient
from chiffon.registry.registry import Registry
from chiffon.registry.wait_queue import OFFERED_SECONDS, ReplyAddress, WaitQueue
from tests.fixtures import plain
from tests.fixtures.caller import Caller
from tests.fixtures.proxy import Proxy
from tests.fixtures.rooms import broken, gpu, record, request, rig
from tests.fixtures.system import orchestrating
from tests.fixtures.waiting import until

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
async def serving(amqp_url: str, database_url: str) -> AsyncIterator[str]:
    """An orchestrator that answers on this virtual host."""
    async with orchestrating(amqp_url, database_url, reservation_offline_seconds=0.5):
        yield amqp_url


@pytest.fixture
async def planner(serving: str) -> AsyncIterator[PlannerClient]:
    async with PlannerClient.open(serving) as opened:
        yield opened


@pytest.fixture
async def caller(serving: str) -> AsyncIterator[Caller]:
    async with plain.channel(serving) as channel:
        yield Caller(channel, await channel.declare_queue(exclusive=True))


async def is_free(registry: Registry) -> bool:
    return not (await ReservationService(registry).reservations(ReservationList())).reservations


async def test_room_is_held_renewed_and_given_back(
    planner: PlannerClient, registry: Registry
) -> None:
    """A lease of seconds is renewed twice."""
    await record(registry, rig(gpu(0, 70.0)))

    async with planner.reserve(request(gpu_vram_gb=20.0, lease_seconds=1.0)) as holding:
        first = holding.reservation
        assert (await planner.reservation(first.reservation_id)).state == "held"

        async def is_renewed() -> bool:
            return (holding.reservation.expires_at - first.expires_at).total_seconds() > 2

        await until(is_renewed, "renewals for longer than two leases")
        assert not holding.lost.is_set()
        assert 0 < holding.seconds_left <= usable_seconds(1.0)

    assert (await planner.reservation(first.reservation_id)).reason == "released"


async def test_an_error_in_the_block_gives_the_room_back(
    planner: PlannerClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 70.0)))

    with pytest.raises(ZeroDivisionError):
        async with planner.reserve(request(gpu_vram_gb=20.0)):
            raise ZeroDivisionError

    assert await is_free(registry)


async def test_the_holder_is_told_when_the_room_is_lost(
    planner: PlannerClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 70.0)))

    async with planner.reserve(request(gpu_vram_gb=20.0, lease_seconds=1.5)) as holding:
        made = holding.reservation
        await ReservationService(registry).release(
            ReservationRelease(reservation_id=made.reservation_id)
        )
        async with asyncio.timeout(10):
            await holding.lost.wait()

    assert "is over since" in str(holding.why_lost)
    assert holding.seconds_left == 0


async def test_refusals_have_their_own_errors(planner: PlannerClient, registry: Registry) -> None:
    await record(registry, rig(gpu(0, 70.0), hostname="rig-7"))
    wanted = request(gpu_vram_gb=50.0)
    made = await planner.reserve_once(wanted)

    with pytest.raises(InsufficientCapacity, match="with gpu_vram_gb 20, rig-7 would fit") as no:
        await planner.reserve_once(request(gpu_vram_gb=50.0))
    assert no.value.details["explanation"]["obstacles"][0]["most"] == 20.0
    with pytest.raises(IdempotencyMismatch):
        await planner.reserve_once(wanted.model_copy(update={"gpu_vram_gb": 1.0}))
    with pytest.raises(ReservationNotFound):
        await planner.renew(ReservationRenew(reservation_id=uuid4()))
    with pytest.raises(StaleFence):
        await planner.renew(
            ReservationRenew(reservation_id=made.reservation_id, fence=made.fence + 1)
        )
    listed = await planner.reservations()
    assert [one.reservation_id for one in listed.reservations] == [made.reservation_id]


async def test_a_find_explains_itself_if_asked_to(
    planner: PlannerClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 30.0), hostname="rig-7"), rig(status="offline"))

    offers = await planner.find(CapacityQuery(min_gpu_vram_gb=40, explain=True))

    assert offers.explanation is not None
    assert offers.explanation.summary == (
        "2 agents: 1 offline, 1 too little free VRAM (best 30 of 40 on rig-7)"
    )
    assert offers.explanation.relaxation is not None
    assert offers.explanation.relaxation.changes == {"min_gpu_vram_gb": 30.0}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "holder"),
        ({"gpu_vram_gb": -1}, "gpu_vram_gb"),
        ({"gpu_vram_gb": 0}, "nothing to take"),
        ({"gpus": 0}, "gpus"),
        ({"count": 0}, "count"),
        ({"lease_seconds": 0.5}, "lease_seconds"),
        ({"lease_seconds": 1e9}, "lease_seconds"),
        ({"idempotency_key": "7"}, "idempotency_key"),
        ({"holder": "a\nb"}, "holder"),
        ({"holder": ""}, "holder"),
        ({"alternatives": [{"gpu_vram_gb": 0}]}, "nothing to take"),
        ({"alternatives": [{}] * 9}, "alternatives"),
        ({"agent_id": str(uuid4()), "count": 2}, "count"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong_with_it(
    caller: Caller, body: dict[str, Any], problem: str
) -> None:
    good = {"holder": "me", "idempotency_key": str(uuid4()), "gpu_vram_gb": 1.0}

    message = await caller.ask("capacity.reserve.v1", {**good, **body} if body else {})

    answer = json.loads(message.body)
    assert answer["code"] == "invalid_request"
    assert problem in answer["message"]


async def test_what_cannot_be_delivered_is_released(
    serving: str, registry: Registry, database: Connection
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    body = json.loads(request(gpu_vram_gb=20.0).model_dump_json())

    async with plain.channel(serving) as channel:
        await plain.publish(
            channel,
            "chiffon.rpc",
            "capacity",
            body,
            "capacity.reserve.v1",
            reply_to="amq.gen-of-nobody",
            correlation_id="1",
        )

        async def is_released() -> bool:
            return bool(
                await database.fetchval(
                    "SELECT count(*) FROM reservation WHERE reason = 'undelivered'"
                )
            )

        await until(is_released, "the reservation is released")
    assert await broken(database) == []
    assert await is_free(registry)


async def test_what_is_reserved_over_direct_reply_to_stays_reserved(
    serving: str, registry: Registry
) -> None:
    """The broker returns a mandatory answer although it delivers it: that tells nothing."""
    await record(registry, rig(gpu(0, 70.0)))
    sent = QUESTIONS.labels("capacity.reserve.v1", "answered")
    before = sent._value.get()
    answers: asyncio.Queue[Any] = asyncio.Queue()

    async with plain.channel(serving) as channel:
        queue = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await queue.consume(answers.put, no_ack=True)
        await plain.publish(
            channel,
            "chiffon.rpc",
            "capacity",
            json.loads(request(gpu_vram_gb=20.0).model_dump_json()),
            "capacity.reserve.v1",
            reply_to="amq.rabbitmq.reply-to",
            correlation_id="1",
        )
        async with asyncio.timeout(10):
            answer = await answers.get()

    async def is_sent() -> bool:
        return bool(sent._value.get() > before)

    await until(is_sent, "the responder is done with it")
    assert answer.type == "capacity.reservation.v1"
    assert not await is_free(registry)


async def test_who_waited_over_direct_reply_to_is_known_to_have_been_offered_something(
    serving: str, registry: Registry
) -> None:
    """Else whoever is next in line is offered the same room at once."""
    answers: asyncio.Queue[Any] = asyncio.Queue()
    async with plain.channel(serving) as channel:
        queue = await channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        await queue.consume(answers.put, no_ack=True)
        for number in range(2):
            await plain.publish(
                channel,
                "chiffon.rpc",
                "capacity",
                {"min_gpu_vram_gb": 40.0, "min_cpu_cores": 0},
                "capacity.wait.v1",
                reply_to="amq.rabbitmq.reply-to",
                correlation_id=str(number),
            )
            await joined(registry, number + 1)
        one = rig(gpu(0, 50.0), interval_seconds=60.0)
        await record(registry, one)
        async with asyncio.timeout(20):
            first = await answers.get()
            answered = time.monotonic()
            second = await answers.get()

    assert (first.correlation_id, second.correlation_id) == ("0", "1")
    assert time.monotonic() - answered > OFFERED_SECONDS / 2, "the first has time to take it"


async def test_a_planner_whose_line_is_cut_gets_the_same_reservation(
    serving: str, registry: Registry, database: Connection
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    async with (
        Proxy.to(serving).running() as proxy,
        PlannerClient.open(proxy.url(serving)) as planner,
    ):
        await planner.find()
        proxy.latency_seconds = 0.2  # so that the line is cut while the answer is on its way
        asking = asyncio.create_task(planner.reserve_once(request(gpu_vram_gb=20.0), timeout=20))

        async def is_made() -> bool:
            return not await is_free(registry)

        await until(is_made, "the reservation")
        resets = proxy.resets
        proxy.resets_after_bytes = 0
        proxy.latency_seconds = 0.0

        async def is_cut() -> bool:
            return proxy.resets > resets

        await until(is_cut, "the line is cut")
        proxy.resets_after_bytes = None
        made = await asking

    assert made.state == "held"
    assert await broken(database) == []
    assert await database.fetchval("SELECT count(*) FROM reservation WHERE state = 'held'") == 1


async def test_what_ends_by_itself_is_told(planner: PlannerClient, registry: Registry) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)

    async with planner.watch() as events:
        made = await planner.reserve_once(request(gpu_vram_gb=20.0, lease_seconds=1.0))
        other = await planner.reserve_once(request(gpu_vram_gb=20.0, lease_seconds=600.0))
        gone = rig(gpu(0, 70.0), agent_id=agent.agent_id, sequence=2, status="offline")
        await record(registry, gone)
        told: dict[UUID, ReservationEvent] = {}
        async with asyncio.timeout(30):
            while len(told) < 2:
                event = await anext(events)
                if isinstance(event, ReservationEvent):
                    told[event.reservation_id] = event

    assert told[made.reservation_id].reason in ("not renewed", "agent offline")
    assert told[other.reservation_id].model_dump(exclude={"at"}) == {
        "reservation_id": other.reservation_id,
        "holder": "a planner",
        "agent_ids": [agent.agent_id],
        "fence": other.fence,
        "state": "revoked",
        "reason": "agent offline",
    }


async def joined(registry: Registry, count: int) -> None:
    """Wait until so many stand in line."""

    async def are_there() -> bool:
        return len(await registry.wait_queue.waiting()) == count

    await until(are_there, f"{count} in line")


async def test_who_waits_is_answered_when_something_fits(
    planner: PlannerClient, registry: Registry
) -> None:
    waiting = asyncio.create_task(
        planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
    )
    await joined(registry, 1)
    agent = rig(gpu(0, 50.0))
    await record(registry, agent)

    offers = await waiting

    assert [one.agent_id for one in offers.agents] == [agent.agent_id]
    await joined(registry, 0)


async def test_who_waits_in_vain_is_told_why_at_the_deadline(
    planner: PlannerClient, registry: Registry
) -> None:
    """A deadline of 2 s is waited for."""
    await record(registry, rig(gpu(0, 30.0), hostname="rig-7"))
    began = time.monotonic()

    offers = await planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=1.5, explain=True))

    assert offers.agents == []
    assert offers.explanation is not None
    assert "best 30 of 40 on rig-7" in offers.explanation.summary
    assert time.monotonic() - began >= 1.5


async def test_who_came_first_is_served_first(planner: PlannerClient, registry: Registry) -> None:
    """Room for one at a time: each is offered it when those before have had their turn.

    Each has a second to take what it is offered.
    """
    answered: list[int] = []

    async def wait(number: int) -> None:
        await planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
        answered.append(number)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(wait(number)))
        await joined(registry, number + 1)
    # Who wants more than there is does not hold up the others.
    greedy = asyncio.create_task(planner.wait(CapacityWait(min_gpu_vram_gb=70, timeout_seconds=20)))
    await joined(registry, 5)
    await record(registry, rig(gpu(0, 50.0), interval_seconds=60.0))
    await asyncio.gather(*tasks)

    assert answered == [0, 1, 2, 3]
    assert not greedy.done()
    greedy.cancel()


async def test_room_for_two_is_offered_to_the_first_two_at_once(
    planner: PlannerClient, registry: Registry
) -> None:
    wanted = CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60)
    waiting = []
    for number in range(2):
        waiting.append(asyncio.create_task(planner.wait(wanted)))
        await joined(registry, number + 1)
    await record(registry, rig(gpu(0, 50.0)), rig(gpu(0, 60.0)))

    first, second = await asyncio.gather(*waiting)

    assert first.agents[0].agent_id != second.agents[0].agent_id
    assert first.agents[0].gpu_vram_available_gb == 60.0


async def test_a_line_outlives_the_responder_that_took_the_question(
    amqp_url: str, database_url: str, registry: Registry
) -> None:
    async with PlannerClient.open(amqp_url) as planner:
        async with orchestrating(amqp_url, database_url):
            waiting = asyncio.create_task(
                planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
            )
            await joined(registry, 1)
        assert not waiting.done()
        async with orchestrating(amqp_url, database_url):
            await record(registry, rig(gpu(0, 50.0)))
            assert len((await waiting).agents) == 1


async def test_who_waits_asks_again_and_outlives_that_nobody_answers(
    broker: str, database_url: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line was lost, and when the question is asked again there is no responder at first."""
    monkeypatch.setattr("chiffon.planner.client.ASK_TO_WAIT_AGAIN_SECONDS", 0.5)
    asked = 0

    async def call(self: RpcClient, *question: Any) -> Any:
        nonlocal asked
        asked += 1
        return await original(self, *question)

    original = RpcClient.call
    monkeypatch.setattr(RpcClient, "call", call)
    async with PlannerClient.open(broker) as planner:
        async with orchestrating(broker, database_url):
            waiting = asyncio.create_task(
                planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
            )
            await joined(registry, 1)
            [one] = await registry.wait_queue.waiting()
        await registry.wait_queue.leave([one.wait_id])
        before = asked

        async def has_asked_nobody() -> bool:
            return asked >= before + 2

        await until(has_asked_nobody, "it asks while nobody is there")
        assert not waiting.done()
        async with orchestrating(broker, database_url):
            await joined(registry, 1)
            await record(registry, rig(gpu(0, 50.0)))
            assert len((await waiting).agents) == 1


async def test_a_waiter_that_is_gone_leaves_the_line(serving: str, registry: Registry) -> None:
    async with PlannerClient.open(serving) as planner:
        waiting = asyncio.create_task(
            planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
        )
        await joined(registry, 1)
        waiting.cancel()
    await record(registry, rig(gpu(0, 50.0)))

    await joined(registry, 0)


async def test_a_planner_may_wait_for_what_it_then_holds(
    planner: PlannerClient, registry: Registry
) -> None:
    """Who waits is looked for once a second."""
    await record(registry, rig(gpu(0, 50.0), interval_seconds=60.0))
    order: list[str] = []

    async def hold(name: str) -> None:
        wanted = request(gpu_vram_gb=40.0, holder=name)
        async with planner.reserve(wanted, wait_seconds=60):
            order.append(name)
            await joined(registry, 4 - len(order))

    first = asyncio.create_task(hold("first"))

    async def has_begun() -> bool:
        return order == ["first"]

    await until(has_begun, "the first holds it")
    others = []
    for number, name in enumerate(("second", "third", "fourth")):
        others.append(asyncio.create_task(hold(name)))
        await joined(registry, number + 1)
    await asyncio.gather(first, *others)

    assert order == ["first", "second", "third", "fourth"]


async def test_an_alternative_is_as_the_request_where_it_says_nothing(
    planner: PlannerClient, registry: Registry
) -> None:
    mine = rig(gpu(0, 45.0), pool_name="mine")
    await record(registry, mine, rig(gpu(0, 70.0), pool_name="theirs"))

    made = await planner.reserve_once(
        request(
            gpu_vram_gb=80.0,
            cpu_cores=4,
            pool_name="mine",
            alternatives=[{"gpu_vram_gb": 40.0, "count": 2}, {"gpu_vram_gb": 40.0}],
        )
    )

    assert (made.agent_id, made.cpu_cores, made.alternative) == (mine.agent_id, 4, 2)


async def test_rows_that_nobody_can_read_hold_up_nobody(
    planner: PlannerClient, registry: Registry, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO wait_queue (wait_id, request, deadline, reply) VALUES"
        " (gen_random_uuid(), '{\"limit\": \"many\"}', now() + interval '1 hour', '{}'),"
        " (gen_random_uuid(), '5', now(), '{}'),"
        " (gen_random_uuid(), '{}', now(), 'null'),"
        " (gen_random_uuid(), '{}', now(), '{\"exchange\": 1, \"key\": 2}'),"
        " (gen_random_uuid(), '{\"explain\": true}', now(),"
        '  \'{"exchange": "", "key": "amq.gen-gone", "correlation_id": null}\')'
    )
    await record(registry, rig(gpu(0, 50.0), interval_seconds=60.0))

    offers = await planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))

    assert len(offers.agents) == 1

    async def is_empty() -> bool:
        left = "SELECT count(*) FROM wait_queue WHERE offered_at IS NULL"
        return not await database.fetchval(left)

    await until(is_empty, "what nobody can read is removed")


async def test_many_who_want_what_is_not_there_hold_up_nobody(
    planner: PlannerClient, registry: Registry, database: Connection
) -> None:
    queue = registry.wait_queue
    greedy = CapacityWait(min_gpu_vram_gb=1_000, timeout_seconds=3_600)
    nobody = ReplyAddress("", "amq.gen-gone", None)
    for _ in range(300):
        assert await queue.join(uuid4(), greedy, nobody)
    await record(registry, rig(gpu(0, 50.0), interval_seconds=60.0))

    offers = await planner.wait(CapacityWait(min_gpu_vram_gb=40, timeout_seconds=60))
    late = await planner.wait(CapacityWait(min_gpu_vram_gb=60, timeout_seconds=0.5))

    assert (len(offers.agents), late.agents) == (1, [])


async def test_who_was_offered_what_another_took_comes_back_to_the_same_place(
    registry: Registry,
) -> None:
    queue = registry.wait_queue
    wanted = CapacityWait(min_gpu_vram_gb=40)
    first, second = uuid4(), uuid4()
    for wait_id in (first, second):
        await queue.join(wait_id, wanted, ReplyAddress("", "amq.gen-x", None))
    agent_id = uuid4()

    await queue.note_offers({first: agent_id})
    assert [one.wait_id for one in await queue.waiting()] == [second]
    assert await queue.offered_lately() == {agent_id}
    await queue.join(first, wanted, ReplyAddress("", "amq.gen-x", None))

    assert [one.wait_id for one in await queue.waiting()] == [first, second]
    assert await queue.offered_lately() == set()


async def test_too_many_who_wait_are_told_so(
    planner: PlannerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_full(*_: Any) -> bool:
        return False

    monkeypatch.setattr(WaitQueue, "join", is_full)

    with pytest.raises(CapacityRefused, match="too many are waiting"):
        await planner.wait(CapacityWait(timeout_seconds=5))
