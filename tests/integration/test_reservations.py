"""What a reservation is: taken once, renewed, given back, ended; and why there is none."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

from chiffon.capacity.reservations import ReservationService
from chiffon.capacity.service import OrchestratorService
from chiffon.contract.messages import (
    CapacityQuery,
    CapacityReserve,
    Reservation,
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
from chiffon.registry.offers import EXAMINED_AT_ONCE, IN_ORDER, Offers, wanted
from chiffon.registry.registry import CONNECTIONS, Registry
from chiffon.registry.statements import STATEMENTS
from tests.fixtures.rooms import broken, gpu, record, request, rig
from tests.fixtures.waiting import until

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
def service(registry: Registry) -> ReservationService:
    return ReservationService(registry)


async def prove_path(registry: Registry, database: Connection) -> None:
    """A canary has come through without a gap for long enough that leases count."""
    await registry.path.mark_fresh(time.monotonic())
    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '1 minute'")


async def pass_time(database: Connection, seconds: float) -> None:
    """Let every reservation's lease be that much nearer to its end."""
    await database.execute(
        "UPDATE reservation SET created_at = created_at - $1 * interval '1 second',"
        " expires_at = expires_at - $1 * interval '1 second'",
        seconds,
    )


async def vram(registry: Registry) -> dict[str | None, float | None]:
    """Return what is offered, by host."""
    found = await OrchestratorService(registry).find(CapacityQuery(min_cpu_cores=0))
    return {one.hostname: one.gpu_vram_available_gb for one in found.agents}


def release(made: Reservation, fence: int | None = None) -> ReservationRelease:
    return ReservationRelease(reservation_id=made.reservation_id, fence=fence)


def renewal(made: Reservation, **fields: Any) -> ReservationRenew:
    return ReservationRenew(reservation_id=made.reservation_id, **fields)


async def test_the_agent_with_most_room_is_taken_and_told(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 30.0), hostname="small"), rig(gpu(0, 70.0), hostname="large"))

    made = await service.reserve(
        request(gpu_vram_gb=20.0, cpu_cores=4, memory_gb=8.0, lease_seconds=30.0)
    )

    assert (made.state, made.hostname, made.lease_seconds) == ("held", "large", 30.0)
    assert [one.model_dump() for one in made.gpus] == [
        {"uuid": "GPU-0", "index": 0, "vram_gb": 20.0}
    ]
    assert (made.expires_at - made.created_at).total_seconds() == 30.0
    assert await vram(registry) == {"large": 50.0, "small": 30.0}


async def test_both_numbers_are_shown_if_asked_for(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    await service.reserve(request(gpu_vram_gb=20.0, cpu_cores=4, memory_gb=8.0))

    query = CapacityQuery(show_reserved=True)
    [offer] = (await OrchestratorService(registry).find(query)).agents

    assert (offer.gpu_vram_available_gb, offer.cpu_cores_available) == (50.0, 10)
    assert offer.reported is not None
    assert offer.reported.model_dump() == {
        "gpu_vram_available_gb": 70.0,
        "gpu_vram_max_available_gb": 70.0,
        "cpu_cores_available": 14,
        "memory_available_gb": 37.5,
    }


async def test_the_same_key_is_the_same_reservation(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)

    first, second = await service.reserve(wanted), await service.reserve(wanted)

    assert first.reservation_id == second.reservation_id
    assert list((await vram(registry)).values()) == [50.0]


async def test_the_same_key_with_another_request_is_refused(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)
    await service.reserve(wanted)

    with pytest.raises(IdempotencyMismatch, match="a new intent needs a new key"):
        await service.reserve(wanted.model_copy(update={"gpu_vram_gb": 10.0}))
    other = await service.reserve(wanted.model_copy(update={"holder": "another"}))

    assert other.holder == "another"


async def test_fences_only_grow_also_when_an_agent_is_forgotten(
    registry: Registry, service: ReservationService
) -> None:
    agent = rig(gpu(0, 70.0))
    fences = []
    for _ in range(3):
        await record(registry, agent)
        fences.append((await service.reserve(request(gpu_vram_gb=20.0))).fence)
        await registry.agents.forget([agent.agent_id])

    assert fences == sorted(set(fences))


async def test_released_room_is_free_at_once_and_twice_is_as_once(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    made = await service.reserve(request(gpu_vram_gb=20.0))

    first, second = await service.release(release(made)), await service.release(release(made))

    assert first.state == "released"
    assert first.ended_at == second.ended_at
    assert list((await vram(registry)).values()) == [70.0]


async def test_a_wrong_fence_neither_renews_nor_releases(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    made = await service.reserve(request(gpu_vram_gb=20.0))

    with pytest.raises(StaleFence, match=f"has fence {made.fence}, not {made.fence + 1}"):
        await service.release(release(made, made.fence + 1))
    with pytest.raises(StaleFence):
        await service.renew(renewal(made, fence=made.fence + 1))

    assert (await service.release(release(made, made.fence))).state == "released"


async def test_what_is_unknown_is_said_to_be_so(service: ReservationService) -> None:
    unknown = uuid4()

    with pytest.raises(ReservationNotFound, match=str(unknown)):
        await service.renew(ReservationRenew(reservation_id=unknown))
    with pytest.raises(ReservationNotFound):
        await service.reservation(unknown)


async def test_an_unrenewed_reservation_frees_itself(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    await prove_path(registry, database)
    made = await service.reserve(request(gpu_vram_gb=20.0, lease_seconds=60))
    kept = await service.reserve(request(gpu_vram_gb=20.0, lease_seconds=60))

    await pass_time(database, 59)
    assert await service.expire() == []
    await service.renew(renewal(kept))
    await pass_time(database, 2)
    [ended] = await service.expire()

    assert (ended.reservation_id, ended.state) == (made.reservation_id, "expired")
    assert list((await vram(registry)).values()) == [50.0]
    with pytest.raises(StaleFence, match="not renewed; its room may be another's"):
        await service.renew(renewal(made))
    with pytest.raises(StaleFence):
        await service.release(release(made))


async def test_a_late_renewal_counts_as_long_as_nobody_has_ended_it(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    await prove_path(registry, database)
    made = await service.reserve(request(gpu_vram_gb=20.0))
    await pass_time(database, 61)

    await service.renew(renewal(made))

    assert await service.expire() == []


async def test_after_our_own_absence_everybody_has_time_to_renew(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    await service.reserve(request(gpu_vram_gb=20.0, lease_seconds=60))
    await pass_time(database, 120)

    assert await service.expire() == [], "no canary has ever come through"
    await registry.path.mark_fresh(time.monotonic())
    assert await service.expire() == [], "the path is back since this moment"
    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '10 seconds'")
    assert len(await service.expire()) == 1


async def test_the_lease_can_be_changed_when_it_is_renewed(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    made = await service.reserve(request(gpu_vram_gb=20.0, lease_seconds=5))

    longer = await service.renew(renewal(made, lease_seconds=500))

    assert (longer.lease_seconds, longer.fence) == (500, made.fence)
    assert (longer.expires_at - longer.as_of).total_seconds() == 500


async def test_what_nobody_took_is_given_back_and_its_key_is_free(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)
    made = await service.reserve_counting(wanted)

    assert await service.undelivered(made)
    again = await service.reserve(wanted)

    assert again.reservation_id != made.reservation.reservation_id
    assert list((await vram(registry)).values()) == [50.0]


async def test_what_was_asked_for_again_meanwhile_is_not_given_back(
    registry: Registry, service: ReservationService
) -> None:
    """The first answer found nobody; the second, on a new connection, was taken."""
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)
    first = await service.reserve_counting(wanted)
    second = await service.reserve(wanted)

    assert not await service.undelivered(first)

    assert (await service.reservation(second.reservation_id)).state == "held"


async def test_a_gang_is_on_so_many_agents_or_on_none(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, *(rig(gpu(0, 30.0), hostname=f"h{n}") for n in range(3)))

    made = await service.reserve(request(gpu_vram_gb=20.0, count=3))

    assert len({place.agent_id for place in made.places}) == 3
    assert made.places[0].agent_id == made.agent_id
    with pytest.raises(InsufficientCapacity):
        await service.reserve(request(gpu_vram_gb=20.0, count=1))
    await service.release(release(made))
    with pytest.raises(InsufficientCapacity, match="3 of 4 fit; with count 3"):
        await service.reserve(request(gpu_vram_gb=20.0, count=4))
    assert list((await vram(registry)).values()) == [30.0, 30.0, 30.0]
    assert await broken(database) == []


async def test_a_gang_may_ask_for_distinct_hosts(
    registry: Registry, service: ReservationService
) -> None:
    await record(
        registry,
        rig(gpu(0, 40.0), hostname="two"),
        rig(gpu(0, 39.0), hostname="two"),
        rig(gpu(0, 30.0), hostname="one"),
    )

    together = await service.reserve(request(gpu_vram_gb=20.0, count=2))
    assert {place.hostname for place in together.places} == {"two"}
    await service.release(release(together))
    apart = await service.reserve(request(gpu_vram_gb=20.0, count=2, distinct_hosts=True))
    assert {place.hostname for place in apart.places} == {"one", "two"}


async def test_alternatives_are_tried_in_turn(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 45.0)), rig(gpu(0, 45.0)))
    wanted = {"gpu_vram_gb": 80.0, "alternatives": [{"gpu_vram_gb": 40.0, "count": 2}]}

    made = await service.reserve(request(**wanted))

    assert (made.alternative, made.gpu_vram_gb, len(made.places)) == (1, 40.0, 2)
    with pytest.raises(InsufficientCapacity, match="nor for the alternative"):
        await service.reserve(request(**wanted))


async def test_a_named_agent_is_taken_and_no_other(
    registry: Registry, service: ReservationService
) -> None:
    small, large = rig(gpu(0, 30.0)), rig(gpu(0, 70.0))
    await record(registry, small, large)

    made = await service.reserve(request(gpu_vram_gb=20.0, agent_id=small.agent_id))
    assert made.agent_id == small.agent_id
    with pytest.raises(InsufficientCapacity) as refused:
        await service.reserve(request(gpu_vram_gb=20.0, agent_id=small.agent_id))
    relaxation = refused.value.details["explanation"]["relaxation"]
    assert relaxation["changes"] in ({"agent_id": None}, {"gpu_vram_gb": 10.0})


async def test_several_gpus_of_one_agent_each_have_the_room(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 30.0), gpu(1, 30.0), gpu(2, 10.0)))

    with pytest.raises(InsufficientCapacity, match="without 3 GPUs, each with 20 GiB"):
        await service.reserve(request(gpu_vram_gb=20.0, gpus=3))
    made = await service.reserve(request(gpu_vram_gb=20.0, gpus=2))

    assert [one.uuid for one in made.gpus] == ["GPU-0", "GPU-1"]


@pytest.mark.parametrize("state", ["offline", "busy"])
async def test_an_agent_that_is_away_or_busy_is_not_taken(
    registry: Registry, service: ReservationService, state: str
) -> None:
    await record(registry, rig(gpu(0, 70.0), status=state))

    with pytest.raises(InsufficientCapacity, match=f"1 {state}"):
        await service.reserve(request(gpu_vram_gb=20.0))


async def test_a_drained_agent_is_not_taken_and_keeps_what_it_holds(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)
    made = await service.reserve(request(gpu_vram_gb=20.0))

    drained = await registry.agents.drain(agent.agent_id, "new fans")
    assert drained is not None
    assert (drained.drained, drained.drain_reason) == (True, "new fans")
    assert list(drained.reserved) == [str(made.reservation_id)]
    with pytest.raises(InsufficientCapacity, match="1 drained"):
        await service.reserve(request(gpu_vram_gb=20.0))
    await record(registry, rig(gpu(0, 70.0), agent_id=agent.agent_id, sequence=2))
    assert await vram(registry) == {}, "whatever it reports"
    assert await service.revoke(300.0) == []
    await service.renew(renewal(made))

    await registry.agents.undrain(agent.agent_id)
    assert list((await vram(registry)).values()) == [50.0]


async def test_what_is_left_at_the_deadline_of_a_drain_is_ended(
    registry: Registry, service: ReservationService
) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)
    made = await service.reserve(request(gpu_vram_gb=20.0))

    await registry.agents.drain(agent.agent_id, deadline_seconds=600)
    assert await service.revoke(300.0) == []
    await registry.agents.drain(agent.agent_id, deadline_seconds=0)
    [ended] = await service.revoke(300.0)

    assert (ended.state, ended.reason) == ("revoked", "agent drained")
    with pytest.raises(StaleFence, match="agent drained"):
        await service.renew(renewal(made))


async def test_what_is_held_on_an_agent_outlives_its_going_offline_for_a_while(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    agents = [rig(gpu(0, 70.0)), rig(gpu(0, 60.0))]
    await record(registry, *agents)
    await prove_path(registry, database)
    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '1 hour'")
    made = await service.reserve(request(gpu_vram_gb=20.0, count=2))
    gone = rig(gpu(0, 70.0), agent_id=agents[0].agent_id, sequence=2, status="offline")
    await record(registry, gone)

    assert await service.revoke(300.0) == []
    await service.renew(renewal(made))
    await database.execute("UPDATE agent_registry SET status_changed_at = now() - interval '301 s'")
    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '299 s'")
    assert await service.revoke(300.0) == [], "after our own absence it has that long again"
    await database.execute("UPDATE ingest_path SET fresh_since = now() - interval '1 hour'")
    [ended] = await service.revoke(300.0)

    assert (ended.reservation_id, ended.state) == (made.reservation_id, "revoked")
    assert ended.reason == "agent offline"
    assert list((await vram(registry)).values()) == [60.0], "the whole gang is free"


async def test_the_holder_on_a_forgotten_agent_learns_that_the_room_is_gone(
    registry: Registry, service: ReservationService
) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)
    made = await service.reserve(request(gpu_vram_gb=20.0))
    await registry.agents.forget([agent.agent_id])

    with pytest.raises(StaleFence, match="forgotten"):
        await service.renew(renewal(made))


async def test_reservations_are_listed_newest_first(
    registry: Registry, service: ReservationService
) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)
    made = [await service.reserve(request(gpu_vram_gb=1.0, holder=f"p{n % 2}")) for n in range(4)]
    await service.release(release(made[3]))

    async def listed(**fields: Any) -> list[UUID]:
        found = await service.reservations(ReservationList(**fields))
        return [one.reservation_id for one in found.reservations]

    ids = [one.reservation_id for one in made]
    assert await listed() == [ids[2], ids[1], ids[0]]
    assert await listed(state=None) == ids[::-1]
    assert await listed(holder="p0") == [ids[2], ids[0]]
    assert await listed(agent_id=agent.agent_id, limit=1) == [ids[2]]
    assert await listed(agent_id=uuid4()) == []


async def test_what_is_long_over_is_forgotten_with_its_key(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)
    made = await service.reserve(wanted)
    await service.release(release(made))
    assert (await service.reserve(wanted)).state == "released", "its key is used"

    await service.purge()
    assert (await service.reservation(made.reservation_id)).state == "released"
    await database.execute("UPDATE reservation SET ended_at = now() - interval '25 hours'")
    await service.purge()

    with pytest.raises(ReservationNotFound):
        await service.reservation(made.reservation_id)


async def test_a_refusal_names_what_would_have_fitted_and_it_does(
    registry: Registry, service: ReservationService
) -> None:
    await record(
        registry,
        rig(gpu(0, 30.0), hostname="rig-7"),
        rig(gpu(0, 70.0), hostname="busy-one", status="busy"),
        rig(gpu(0, 35.0), hostname="rig-8", resources={"cpu_cores_available": 1}),
    )
    wanted = request(gpu_vram_gb=40.0, cpu_cores=4)

    with pytest.raises(InsufficientCapacity) as refused:
        await service.reserve(wanted)

    told = refused.value.details["explanation"]
    assert told["summary"] == ("3 agents: 1 busy, 2 too little free VRAM (best 35 of 40 on rig-8)")
    assert told["relaxation"]["message"] == "with gpu_vram_gb 30, rig-7 would fit"
    relaxed = wanted.model_copy(
        update={"idempotency_key": uuid4(), **told["relaxation"]["changes"]}
    )
    assert (await service.reserve(relaxed)).hostname == "rig-7"


async def test_where_nothing_can_be_relaxed_nothing_is_proposed(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0), status="busy"))

    with pytest.raises(InsufficientCapacity) as refused:
        await service.reserve(request(gpu_vram_gb=40.0))

    assert refused.value.details["explanation"]["relaxation"] is None


async def test_many_holders_on_one_agent_never_have_more_than_it_has(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 24.0, 24.0), gpu(1, 24.0, 24.0)))

    async def take(amount: float) -> float:
        try:
            await service.reserve(request(gpu_vram_gb=amount))
        except CapacityRefused:
            return 0.0
        return amount

    amounts = [7.0, 5.5, 3.25, 0.1, 0.2, 11.0] * 3
    granted = await asyncio.gather(*(take(amount) for amount in amounts))

    assert sum(granted) <= 48.0
    assert await broken(database) == []


async def test_the_answer_to_a_second_copy_gives_nothing_back(
    registry: Registry, service: ReservationService
) -> None:
    """The first answer was taken; whoever gets the question again finds nobody."""
    await record(registry, rig(gpu(0, 70.0)))
    wanted = request(gpu_vram_gb=20.0)
    made = await service.reserve(wanted)

    assert not await service.undelivered(await service.reserve_counting(wanted))

    assert (await service.reservation(made.reservation_id)).state == "held"


async def test_what_was_renewed_is_not_given_back(
    registry: Registry, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    made = await service.reserve_counting(request(gpu_vram_gb=20.0))
    await service.renew(renewal(made.reservation))

    assert not await service.undelivered(made)


async def test_a_gpu_whose_uuid_is_not_told_for_once_is_not_given_twice(
    registry: Registry, service: ReservationService
) -> None:
    agent = rig(gpu(0, 80.0), gpu(1, 10.0))
    await record(registry, agent)
    await service.reserve(request(gpu_vram_gb=60.0))

    for sequence, told in enumerate([[gpu(0, 80.0, uuid=None), gpu(1, 10.0)], []], start=2):
        resources = {"gpu_vram_total_gb": 160.0, "gpu_vram_available_gb": 90.0}
        said = rig(*told, agent_id=agent.agent_id, sequence=sequence, resources=resources)
        await record(registry, said)
        with pytest.raises(InsufficientCapacity):
            await service.reserve(request(gpu_vram_gb=60.0))


async def test_an_agent_holds_so_many_and_no_more(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    """It takes 128 reservations."""
    await record(registry, rig(gpu(0, 70.0)))
    for _ in range(16):
        await asyncio.gather(*(service.reserve(request(gpu_vram_gb=0.01)) for _ in range(8)))

    with pytest.raises(InsufficientCapacity):
        await service.reserve(request(gpu_vram_gb=0.01))
    assert await broken(database) == []


@pytest.mark.parametrize(
    "written",
    [
        {"gpus": [{"uuid": 5, "index": "0", "vram_total_gb": 80, "vram_available_gb": 70}]},
        {"gpus": [{"uuid": None, "index": None, "vram_total_gb": 80, "vram_available_gb": 70}]},
        {"gpus": [{"index": -1, "vram_total_gb": 80, "vram_available_gb": 70}]},
    ],
)
async def test_room_on_an_agent_that_others_wrote_can_be_taken_shown_and_ended(
    registry: Registry,
    database: Connection,
    service: ReservationService,
    written: dict[str, Any],
) -> None:
    agent = rig(gpu(0, 70.0))
    await record(registry, agent)
    await prove_path(registry, database)
    await database.execute(
        "UPDATE agent_registry SET resource_metrics = resource_metrics || $1::jsonb",
        json.dumps(written),
    )

    made = await service.reserve(request(gpu_vram_gb=20.0))
    shown = await OrchestratorService(registry).agent(agent.agent_id)
    assert [one.reservation_id for one in shown.reserved] == [made.reservation_id]
    await pass_time(database, 120)

    assert len(await service.expire()) == 1


@pytest.mark.parametrize("held", ["null", "[]", "7", '{"mine": 1}', '{"mine": {"fence": "x"}}'])
async def test_what_others_write_where_reservations_are_held_harms_nobody(
    registry: Registry, database: Connection, service: ReservationService, held: str
) -> None:
    odd, good = rig(gpu(0, 80.0)), rig(gpu(0, 40.0), hostname="good")
    await record(registry, odd, good)
    await prove_path(registry, database)
    try:
        await database.execute(
            "UPDATE agent_registry SET reserved = $1::jsonb, drained = true,"
            " drain_deadline = now() - interval '1 second' WHERE agent_id = $2",
            held,
            odd.agent_id,
        )
    except asyncpg.DataError:
        return  # refused as it was written

    assert (await service.reserve(request(gpu_vram_gb=20.0))).hostname == "good"
    assert len((await OrchestratorService(registry).agents()).agents) == 2
    assert await service.revoke(300.0) == []


async def test_amounts_below_zero_and_odd_words_of_others_do_not_break_refusals(
    registry: Registry, database: Connection, service: ReservationService
) -> None:
    await record(registry, rig(gpu(0, 10.0)))
    await database.execute(
        "UPDATE agent_registry SET capabilities = '5',"
        " resource_metrics = resource_metrics || '{\"memory_available_gb\": -1}'"
    )

    with pytest.raises(InsufficientCapacity, match="no room: 1 agent"):
        await service.reserve(request(gpu_vram_gb=20.0, capabilities=["cuda12"]))


async def test_that_there_is_no_room_is_said_although_the_reason_takes_too_long(
    registry: Registry,
    service: ReservationService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("chiffon.capacity.reservations.EXPLAINED_SECONDS", 0.0)
    await record(registry, rig(gpu(0, 24.0, 24.0)))

    with pytest.raises(
        InsufficientCapacity, match="no room: the reason could not be found"
    ) as refused:
        await service.reserve(request(gpu_vram_gb=40.0))

    assert refused.value.details == {}
    assert "refusals are without a reason" in caplog.text


async def test_those_who_are_refused_the_same_at_once_share_one_look(
    registry: Registry, service: ReservationService, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, decided, all_decided = 0, 0, asyncio.Event()
    examine, would_fit = Offers.examine, ReservationService._would_fit
    requests = [request(gpu_vram_gb=40.0) for _ in range(6)]

    async def examined(self: Offers, **options: Any) -> AsyncGenerator[list[Any], None]:
        nonlocal looks
        looks += 1
        await all_decided.wait()
        async for rows in examine(self, **options):
            yield rows

    async def would(self: ReservationService, *arguments: Any) -> bool:
        nonlocal decided
        answer = await would_fit(self, *arguments)
        decided += 1
        if decided == len(requests):
            all_decided.set()
        return answer

    monkeypatch.setattr("chiffon.capacity.reservations.EXPLAINED_SECONDS", 60.0)
    monkeypatch.setattr(Offers, "examine", examined)
    monkeypatch.setattr(ReservationService, "_would_fit", would)
    await record(registry, rig(gpu(0, 24.0, 24.0)))

    async def refused(one: CapacityReserve) -> str:
        with pytest.raises(InsufficientCapacity) as error:
            await service.reserve(one)
        return error.value.message

    said = await asyncio.gather(*(refused(one) for one in requests))

    assert len(set(said)) == 1
    assert "too little free VRAM" in said[0]
    assert looks == 1


@pytest.mark.parametrize(
    ("name", "pool", "index"),
    [
        ("find", None, "idx_agent_registry_offers"),
        ("find_in_pool", "default", "idx_agent_registry_pool_offers"),
        ("lock_candidates", None, "idx_agent_registry_offers"),
        ("lock_candidates_in_pool", "default", "idx_agent_registry_pool_offers"),
    ],
)
async def test_candidates_are_read_from_the_index_of_the_offers(
    registry: Registry, database: Connection, name: str, pool: str | None, index: str
) -> None:
    await record(registry, rig(gpu(0, 24.0, 24.0)))
    for setting, value in IN_ORDER.items():
        await database.execute(f"SET {setting} = '{value}'")
    asked = request(gpu_vram_gb=20.0, pool_name=pool)
    statement = STATEMENTS[name]
    prepared = await database.prepare(f"EXPLAIN {statement.text}")
    others = {
        "holder": asked.holder,
        "idempotency_key": asked.idempotency_key,
        "most": 1,
        "skipped": 0,
        "without": [],
    }
    given = {**wanted(asked.needs()), **others}

    plan = await prepared.fetch(*(given[one] for one in statement.parameters))

    lines = [row[0] for row in plan]
    assert any(f"Index Scan using {index} on agent_registry r" in line for line in lines), lines
    assert not any("Seq Scan on agent_registry" in line for line in lines)


async def test_those_who_are_refused_leave_connections_for_others(
    registry: Registry, service: ReservationService, database: Connection
) -> None:
    looking = (
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database"
        " WHERE NOT granted AND relation = 'agent_registry'::regclass"
        " AND datname = current_database()"
    )

    async def are_looking() -> bool:
        return bool(await database.fetchval(looking) == EXAMINED_AT_ONCE)

    held = database.transaction()
    await held.start()
    await database.execute("LOCK TABLE agent_registry IN ACCESS EXCLUSIVE MODE")
    capacity = OrchestratorService(registry)
    asking = [
        asyncio.create_task(capacity.explain(CapacityQuery(min_gpu_vram_gb=float(number))))
        for number in range(2 * CONNECTIONS)
    ]
    await until(are_looking, "as many as may look at every agent")

    assert await registry.revision() is not None

    assert await are_looking()
    await held.rollback()
    await asyncio.gather(*asking)
