"""The published schema and the decoder take and refuse the same, field by field."""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from chiffon.contract.codec import decode, json_schema
from chiffon.contract.messages import BODIES
from chiffon.errors import BadMessage
from tests.fixtures.heartbeats import HEARTBEAT

ID = "6e5b0a3e-3c1e-4f0e-9f3a-0c5b1c9d7a11"
NOW = "2026-01-01T00:00:00Z"

NEEDS: dict[str, Any] = {
    "min_gpu_vram_gb": 1.0,
    "min_single_gpu_vram_gb": 1.0,
    "min_cpu_cores": 1,
    "min_memory_gb": 1.0,
    "agent_type": "desktop",
    "pool_name": "default",
    "gpu_type": "nvidia",
    "capabilities": ["gpu"],
}
QUERY = {**NEEDS, "limit": 10, "explain": False, "show_reserved": False}
TAKEN = {"gpu_vram_gb": 1.0, "cpu_cores": 1, "memory_gb": 1.0, "gpus": 1, "count": 1}
PLACE = {
    "agent_id": ID,
    "hostname": "rig-7",
    "pool_name": "default",
    "gpus": [{"uuid": "GPU-1", "index": 0, "vram_gb": 1.0}],
}
RESERVATION = {
    **PLACE,
    **{"reservation_id": ID, "holder": "me", "idempotency_key": ID, "state": "held"},
    **{"reason": None, "fence": 1, "lease_seconds": 60.0, "created_at": NOW, "expires_at": NOW},
    **{"ended_at": None, "as_of": NOW, "gpu_vram_gb": 1.0, "cpu_cores": 1, "memory_gb": 1.0},
    **{"places": [PLACE], "alternative": 0},
}
CAPACITY = {
    **{"agent_id": ID, "status": "online", "cpu_percent": 1.0, "cpu_cores_physical": 4},
    **{"cpu_cores_available": 2, "cpu_load_1min": 1.0, "cpu_load_5min": 1.0},
    **{"memory_percent": 1.0, "memory_available_gb": 1.0, "gpu_vram_total_gb": 2.0},
    **{"gpu_vram_available_gb": 1.0, "gpu_type": "nvidia", "timestamp": NOW},
    "heartbeat_age_seconds": 1.0,
}
HELD = {"reservation_id": ID, "fence": 1}

VALID: dict[str, dict[str, Any]] = {
    "status_update.v1": json.loads(HEARTBEAT.read_text()),
    "capacity.show.v1": {"agent_id": ID},
    "capacity.find.v1": QUERY,
    "capacity.wait.v1": {**QUERY, "timeout_seconds": 5.0, "wait_id": ID},
    "capacity.reserve.v1": {
        **NEEDS,
        **TAKEN,
        **{"holder": "me", "idempotency_key": ID, "lease_seconds": 60.0, "agent_id": ID},
        **{"distinct_hosts": False, "alternatives": [{**NEEDS, **TAKEN, "agent_id": ID}]},
    },
    "capacity.renew.v1": {**HELD, "lease_seconds": 60.0},
    "capacity.release.v1": HELD,
    "capacity.reservation.show.v1": {"reservation_id": ID},
    "capacity.reservation.list.v1": {
        "state": "held",
        "holder": "me",
        "agent_id": ID,
        "limit": 10,
    },
    "capacity.agent.v1": CAPACITY,
    "capacity.offers.v1": {
        **{"as_of": NOW, "degraded": False, "total_matches": 1, "total_relation": "eq"},
        "agents": [
            {
                **{name: CAPACITY[name] for name in ("agent_id", "status", "gpu_type")},
                **{"agent_type": "desktop", "pool_name": "default", "hostname": None},
                **{"gpu_vram_available_gb": 1.0, "gpu_vram_total_gb": 2.0},
                **{"cpu_cores_available": 2, "cpu_load_1min": 1.0, "memory_available_gb": 1.0},
                **{"performance_score": 0.0, "last_heartbeat_at": NOW},
                "heartbeat_age_seconds": 1.0,
            }
        ],
    },
    "capacity.reservation.v1": RESERVATION,
    "capacity.reservations.v1": {"as_of": NOW, "reservations": [RESERVATION]},
    "error.v1": {"code": "expired", "message": "late", "details": {}},
    "agent_event.v1": {
        **{"agent_id": ID, "pool_name": "default", "hostname": None, "status": "offline"},
        **{"reason": "silent", "at": NOW},
    },
    "fleet_event.v1": {"state": "degraded", "pool_name": "default", "at": NOW},
    "reservation_event.v1": {
        **{"reservation_id": ID, "holder": "me", "agent_ids": [ID], "fence": 1},
        **{"state": "expired", "reason": "expired", "at": NOW},
    },
}

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 3, 3.0, -0.0, -1, -1.0, 0.5, 1e3, 64.0, 65.0, 100.0, 101.0),
    *(2**31, float(2**31), 2**53 - 1, 2**53, float(2**53), 2**63, 2.0**63, 10**30, 1e300),
    *("3", "3.0", "", "x" * 300, "none", "a b", "\x00", [], ["x"], [3.0], {}, {"x": 1}),
]

BETWEEN_FIELDS = re.compile(
    r"is more than|there is VRAM|two have the same index|nothing to take"
    r"|more than can be asked for|only 1 where agent_id"
)
"""Rules about several fields at once, which the schema does not have."""

OF_A_FORMAT = re.compile(r"UUID|datetime|must be a string|timezone|between the years")
"""What JSON Schema calls a format, and does not check."""


def variants(body: Any) -> Iterator[Any]:
    """Yield copies of a body, each with another value in one place, or a field more or less."""
    for place in _places(body):
        for value in VALUES:
            yield _with(body, place, value)
        if isinstance(place[-1], str):
            yield _with(body, place, _GONE)
        if isinstance(_at(body, place), dict):
            yield _with(body, (*place, "unknown"), 1)
    yield {**body, "unknown": 1}


_GONE = object()


def _places(body: Any) -> Iterator[tuple[Any, ...]]:
    inner = body.items() if isinstance(body, dict) else enumerate(body)
    for name, value in inner:
        yield (name,)
        if isinstance(value, dict | list):
            yield from ((name, *rest) for rest in _places(value))


def _at(body: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        body = body[name]
    return body


def _with(body: Any, place: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(body)
    inner = _at(made, place[:-1])
    if value is _GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return made


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_the_schema_and_the_decoder_agree(kind: str) -> None:
    schema = json_schema()
    validator = Draft202012Validator({**schema, "$ref": schema["x-amqp-types"][kind]["$ref"]})
    disagreements, taken, refused = [], 0, 0
    for body in [VALID[kind], *variants(VALID[kind])]:
        fits = validator.is_valid(body)
        try:
            decode(BODIES[kind], json.dumps(body).encode())
        except BadMessage as error:
            refused += 1
            reason = str(error)
            if fits and not BETWEEN_FIELDS.search(reason) and not OF_A_FORMAT.search(reason):
                disagreements.append((body, reason))
        else:
            taken += 1
            if not fits:
                disagreements.append((body, "taken"))

    assert not disagreements, disagreements[:3]
    assert taken
    assert refused > 1


def test_every_whole_number_may_be_written_with_a_point() -> None:
    """As a program writes them whose language has one kind of number."""
    for kind, body in VALID.items():
        text = re.sub(r"(?<=[:\[] )(\d+)(?=[,}\]])", r"\1.0", json.dumps(body))
        assert decode(BODIES[kind], text.encode()) == decode(
            BODIES[kind], json.dumps(body).encode()
        )
