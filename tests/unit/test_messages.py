"""The wire contract: what is taken, what is refused, and why."""

import json
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from chiffon.contract.codec import (
    MAX_MESSAGE_BYTES,
    decode,
    decode_heartbeat,
    encode,
    json_schema,
    routing_key,
)
from chiffon.contract.messages import CapacityQuery, ResourceMetrics, StatusUpdate
from chiffon.errors import BadMessage
from tests.fixtures.heartbeats import HEARTBEAT

# The example of the design, as somebody would type it.
BODY: dict[str, Any] = json.loads(HEARTBEAT.read_text())
AGENT = BODY["agent_id"]
KEY = f"heartbeat.default.desktop.{AGENT}"

# What is written beyond the example, where the sender did not say it.
NOT_SAID: dict[str, Any] = {
    "gpu_vram_max_available_gb": 20.5,
    "gpu_sample_age_seconds": None,
    "overridden": [],
    "kept": None,
}


def changed(**fields: Any) -> bytes:
    return json.dumps({**BODY, **fields}).encode()


def resources(**fields: Any) -> bytes:
    return changed(resources={**BODY["resources"], **fields})


def test_the_example_of_the_design_is_read_and_written_unchanged() -> None:
    read = decode_heartbeat(changed(), KEY)

    written = json.loads(encode(read))
    [gpu] = written["resources"]["gpus"]
    assert gpu.pop("is_unified") is False
    assert written == {**BODY, "resources": {**BODY["resources"], **NOT_SAID}}


def gpu(index: int, free: float | None) -> dict[str, Any]:
    return {"index": index, "vram_total_gb": 80.0, "vram_available_gb": free}


@pytest.mark.parametrize(
    ("gpus", "scalar", "most"),
    [
        (None, 20.5, 20.5),
        ([], 20.5, 20.5),
        ([], None, None),
        ([gpu(0, 10.0), gpu(1, 30.0)], 40.0, 30.0),
        ([gpu(0, 10.0), gpu(1, None)], None, None),
        ([gpu(0, 20.3)], 20.0, 20.0),
        ([gpu(0, 20.03), gpu(1, 0.0)], 20.0, 20.0),
        ([gpu(0, None)], None, None),
        # The scalars speak for one vendor of two.
        ([gpu(0, 10.0), gpu(1, 30.0)], 10.0, 10.0),
    ],
)
def test_an_agent_that_does_not_say_what_one_gpu_has_free_is_asked_for_its_gpus(
    gpus: list[dict[str, Any]] | None, scalar: float | None, most: float | None
) -> None:
    said: dict[str, Any] = {"gpu_vram_available_gb": scalar, "gpu_type": "nvidia"}
    if gpus is not None:
        said["gpus"] = gpus

    read = decode_heartbeat(changed(resources=said), KEY)

    assert read.resources is not None
    assert read.resources.gpu_vram_max_available_gb == most


def test_an_agent_that_does_not_know_what_one_gpu_has_free_is_believed() -> None:
    read = decode_heartbeat(resources(gpu_vram_max_available_gb=None), KEY)

    assert read.resources is not None
    assert read.resources.gpu_vram_max_available_gb is None


def test_a_heartbeat_without_resources_is_taken() -> None:
    body = {name: value for name, value in BODY.items() if name != "resources"}

    read = decode_heartbeat(json.dumps(body).encode(), KEY)

    assert read.resources is None


def test_a_scalar_that_is_left_out_is_unknown_and_not_zero() -> None:
    metrics = ResourceMetrics(cpu_percent=50.0)

    assert (metrics.memory_available_gb, metrics.gpu_vram_available_gb) == (None, None)


def test_no_gpu_means_a_known_zero_of_vram() -> None:
    metrics = ResourceMetrics(gpu_type="none")

    assert (metrics.gpu_vram_total_gb, metrics.gpu_vram_available_gb) == (0.0, 0.0)


def test_unknown_fields_are_ignored() -> None:
    read = decode_heartbeat(changed(colour="red"), KEY)

    assert "colour" not in json.loads(encode(read))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON: the body is empty"),
        (b"   ", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"\x80\x04N.", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"[" * 300, "not JSON"),
        (b"null", "expected a JSON object"),
        (b"5", "expected a JSON object"),
        (b'"x"', "expected a JSON object"),
        (b"{}", "agent_id: Field required"),
        (changed(agent_id="7"), "agent_id"),
        (changed(agent_id=5), "agent_id: must be a string"),
        (changed(agent_type="toaster"), "agent_type"),
        (changed(pool_name="a.b"), "pool_name"),
        (changed(pool_name="a\n"), "pool_name"),
        (changed(pool_name=""), "pool_name"),
        (changed(status="asleep"), "status"),
        (changed(hostname="a\u0000b"), "hostname"),
        (changed(hostname="a\u202eb"), "hostname"),
        (changed(hostname="\u001b[31m"), "hostname"),
        (changed(capabilities=["a b"]), "capabilities.0"),
        (changed(incarnation=-1), "incarnation"),
        (changed(incarnation=2**53), "incarnation"),
        (changed(incarnation="5"), "incarnation"),
        (changed(incarnation=True), "incarnation"),
        (changed(sequence=0), "sequence"),
        (changed(sequence=1.5), "sequence"),
        (changed(sent_at="yesterday"), "sent_at"),
        (changed(sent_at="2026-01-01T00:00:00"), "sent_at"),
        (changed(sent_at="0001-01-01T00:00:00+14:00"), "sent_at"),
        (changed(sent_at=1767225600), "sent_at: must be a string"),
        (changed(interval_seconds=0.4), "interval_seconds"),
        (changed(interval_seconds=601), "interval_seconds"),
        (resources(cpu_percent=101), "resources.cpu_percent"),
        (resources(cpu_cores_available=1.5), "resources.cpu_cores_available"),
        (resources(cpu_cores_available=-1), "resources.cpu_cores_available"),
        (resources(gpu_vram_available_gb=25.0), "gpu_vram_available_gb is more than"),
        (resources(gpu_vram_max_available_gb=21.0), "gpu_vram_max_available_gb is more than"),
        (resources(gpu_type="none"), "there is VRAM"),
        (resources(gpus=[{"index": 0}, {"index": 0}]), "two have the same index"),
        (resources(gpus=[{"index": i} for i in range(65)]), "resources.gpus"),
        (resources(probe_errors=["two\nlines"]), "resources.probe_errors.0"),
        (changed().replace(b"12.5", b"1e999"), "resources.cpu_percent: Input should be a finite"),
        (changed().replace(b"12.5", b"9" * 5_000), "not JSON: number out of range"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason_that_names_it(body: bytes, reason: str) -> None:
    with pytest.raises(BadMessage) as refused:
        decode_heartbeat(body, KEY)

    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        f"heartbeat.other.desktop.{AGENT}",
        f"heartbeat.default.code.{AGENT}",
        f"heartbeat.default.desktop.{UUID(int=1)}",
        f"heartbeat.default.desktop.{AGENT}.x",
        "",
    ],
)
def test_a_routing_key_that_does_not_agree_with_the_body_is_refused(key: str) -> None:
    with pytest.raises(BadMessage, match="does not agree"):
        decode_heartbeat(changed(), key)


def test_a_routing_key_may_spell_the_id_in_capitals() -> None:
    read = decode_heartbeat(changed(agent_id=AGENT.upper()), KEY.upper().replace("H", "h", 1))

    assert routing_key(read) == KEY


def test_a_heartbeat_of_the_largest_size_is_taken_and_one_byte_more_is_not() -> None:
    body = changed()
    padded = body + b" " * (MAX_MESSAGE_BYTES - len(body))

    assert decode_heartbeat(padded, KEY)
    with pytest.raises(BadMessage, match="65537 bytes; at most 65536"):
        decode_heartbeat(padded + b" ", KEY)


def test_a_query_has_the_defaults_of_the_design() -> None:
    query = decode(CapacityQuery, b"{}")

    assert query.model_dump() == {
        "min_gpu_vram_gb": 0.0,
        "min_single_gpu_vram_gb": 0.0,
        "min_cpu_cores": 1,
        "min_memory_gb": 0.0,
        "agent_type": "desktop",
        "pool_name": None,
        "gpu_type": None,
        "capabilities": [],
        "limit": 100,
        "explain": False,
        "show_reserved": False,
    }


@pytest.mark.parametrize(
    "needs",
    [
        {"limit": 0},
        {"limit": 1001},
        {"min_cpu_cores": -1},
        {"min_gpu_vram_gb": -0.1},
        {"min_gpu_vram_gb": "4"},
        {"agent_type": "toaster"},
        {"capabilities": "gpu"},
    ],
)
def test_needs_out_of_range_are_refused(needs: dict[str, Any]) -> None:
    [name] = needs

    with pytest.raises(BadMessage, match=name):
        decode(CapacityQuery, json.dumps(needs).encode())


def test_the_schema_is_valid_and_the_example_fits_it() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    heartbeat = {**schema, "$ref": schema["x-amqp-types"]["status_update.v1"]["$ref"]}

    assert Draft202012Validator(heartbeat).is_valid(BODY)
    assert not Draft202012Validator(heartbeat).is_valid({**BODY, "sequence": 0})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["none", "NaN", AGENT, "1767225600", "2026-01-01T00:00:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
PLACES = [*((name,) for name in BODY), *(("resources", name) for name in BODY["resources"]), ("x",)]


@given(
    st.lists(st.tuples(st.sampled_from(PLACES), st.none() | JSON), max_size=3),
    st.sampled_from(
        [
            KEY,
            KEY.upper(),
            KEY.replace("-", ""),
            f"{KEY.replace('-', '')}----",
            "heartbeat.x",
        ]
    ),
)
def test_reading_in_one_go_takes_and_refuses_what_reading_in_steps_does(
    changes: list[tuple[tuple[str, ...], Any]], key: str
) -> None:
    body = json.loads(json.dumps(BODY))
    for place, value in changes:
        inner = body if len(place) == 1 else body.get("resources")
        if isinstance(inner, dict):
            inner[place[-1]] = value
    encoded = json.dumps(body).encode()

    def outcome() -> Any:
        try:
            return decode_heartbeat(encoded, key)
        except BadMessage as error:
            return str(error)

    in_one_go = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chiffon.contract.codec._valid_heartbeat", lambda *_: None)
        in_steps = outcome()

    assert in_one_go == in_steps


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_and_nothing_else(body: bytes) -> None:
    with suppress(BadMessage):
        decode_heartbeat(body, KEY)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
    st.sampled_from(sorted(BODY)),
)
def test_a_field_with_anything_in_it_is_read_or_refused_by_name(value: Any, name: str) -> None:
    try:
        read = decode_heartbeat(changed(**{name: value}), KEY)
    except BadMessage as error:
        said = str(error)
    else:
        said = "" if isinstance(read, StatusUpdate) else "not a heartbeat"

    assert said == "" or any(word in said for word in (name, "not JSON", "does not agree"))
