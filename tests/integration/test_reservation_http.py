"""Reservations through real HTTP on a real database."""

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from chiffon.registry.registry import Registry
from tests.fixtures import gateway
from tests.fixtures.rooms import gpu, record, rig

WHERE = "/api/v1/reservations"


@pytest.fixture
async def http(broker: str, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.serving(broker, database_url) as client:
        yield client


def wanted(**fields: Any) -> dict[str, Any]:
    return {"holder": "a shell", "idempotency_key": str(uuid4()), "gpu_vram_gb": 20.0, **fields}


async def test_room_is_taken_renewed_listed_and_given_back(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 70.0), hostname="rig-7"))
    request = wanted(lease_seconds=30)

    made = await http.post(WHERE, json=request)
    again = await http.post(WHERE, json=request)

    assert (made.status_code, again.status_code) == (201, 200)
    one = made.json()
    assert (one["hostname"], one["state"], one["gpus"][0]["uuid"]) == ("rig-7", "held", "GPU-0")
    assert again.json()["reservation_id"] == one["reservation_id"]
    path = f"{WHERE}/{one['reservation_id']}"
    renewed = await http.post(f"{path}/renew", json={"fence": one["fence"], "lease_seconds": 90})
    assert (renewed.status_code, renewed.json()["lease_seconds"]) == (200, 90)
    listed = (await http.get(WHERE, params={"state": "held", "holder": "a shell"})).json()
    assert [each["reservation_id"] for each in listed["reservations"]] == [one["reservation_id"]]
    agent = (await http.get(f"/api/v1/agents/{one['agent_id']}")).json()
    assert agent["reserved"][0]["reservation_id"] == one["reservation_id"]
    assert agent["available"]["gpu_vram_gb"] == 50.0

    released = await http.post(f"{path}/release", json={})
    assert (released.status_code, released.json()["state"]) == (200, "released")
    assert (await http.get(path)).json()["reason"] == "released"


async def test_a_refusal_is_a_409_that_explains_itself(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 10.0), hostname="rig-7"))

    answer = await http.post(WHERE, json=wanted())

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "insufficient_capacity")
    assert "best 10 of 20 on rig-7" in problem["detail"]
    assert problem["details"]["explanation"]["relaxation"]["changes"] == {"gpu_vram_gb": 10.0}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"gpu_vram_gb": "20"}, "gpu_vram_gb"),
        ({"gpu_vram_gb": -1}, "gpu_vram_gb"),
        ({"gpu_vram_gb": 0}, "nothing to take"),
        ({"holder": ""}, "holder"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"idempotency_key": "once"}, "idempotency_key"),
    ],
)
async def test_a_bad_request_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, body: dict[str, Any], problem: str
) -> None:
    answer = await http.post(WHERE, json=wanted(**body))

    assert answer.status_code == 400
    assert problem in answer.json()["detail"]


async def test_what_is_over_or_unknown_is_said_to_be_so(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    request = wanted()
    one = (await http.post(WHERE, json=request)).json()
    path = f"{WHERE}/{one['reservation_id']}"

    stale = await http.post(f"{path}/renew", json={"fence": one["fence"] + 1})
    other = await http.post(WHERE, json={**request, "gpu_vram_gb": 1.0})
    await http.post(f"{path}/release", json={})
    late = await http.post(f"{path}/renew", json={})
    unknown = await http.post(f"{WHERE}/{UUID(int=1)}/renew", json={})
    nonsense = await http.get(f"{WHERE}/mine")
    # More than PostgreSQL's bigint holds.
    huge = await http.post(f"{path}/release", json={"fence": 2**63})

    assert [
        (each.status_code, each.json()["code"])
        for each in (stale, other, late, unknown, nonsense, huge)
    ] == [
        (409, "stale_fence"),
        (409, "idempotency_mismatch"),
        (409, "stale_fence"),
        (404, "reservation_not_found"),
        (400, "invalid_request"),
        (400, "invalid_request"),
    ]
    assert nonsense.json()["detail"] == "Invalid reservation_id format (must be UUID)"


async def test_a_body_that_is_none_of_ours_is_refused(http: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}"

    huge = await http.post(WHERE, content=b"[" * 100_000)
    unsized = await http.post(WHERE, content=chunks())
    deep = await http.post(
        WHERE, content=b"[" * 60_000, headers={"Content-Type": "application/json"}
    )
    # What a form of another site can send without asking first.
    plain = await http.post(
        WHERE, content=json.dumps(wanted()), headers={"Content-Type": "text/plain"}
    )

    assert [each.status_code for each in (huge, unsized, deep, plain)] == [413, 413, 400, 400]


async def test_the_offers_show_both_numbers_over_http(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    await record(registry, rig(gpu(0, 70.0)))
    await http.post(WHERE, json=wanted())

    path = "/api/v1/agents/available-capacity"
    [offer] = (await http.get(path, params={"show_reserved": "true"})).json()
    [usual] = (await http.get(path)).json()

    assert (offer["gpu_vram_available_gb"], offer["reported"]["gpu_vram_available_gb"]) == (50, 70)
    assert "reported" not in usual


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (WHERE, wanted(gpu_vram=1), "unknown field gpu_vram; did you mean gpu_vram_gb?"),
        (
            f"{WHERE}/{UUID(int=1)}/renew",
            {"lease": 9},
            "unknown field lease; did you mean lease_seconds?",
        ),
        (
            f"{WHERE}/{UUID(int=1)}/release",
            {"fences": 1},
            "unknown field fences; did you mean fence?",
        ),
        (f"{WHERE}?agent_type=any", wanted(), "agent_type: unknown parameter"),
    ],
)
async def test_what_is_misspelt_is_refused_by_name(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], said: str
) -> None:
    answer = await http.post(path, json=body)

    assert answer.status_code == 400
    assert said in answer.json()["detail"]
