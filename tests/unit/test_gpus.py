"""The GPUs of all vendors as the fields of a heartbeat, and what the operator says of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiffon.contract.messages import Gpu, ResourceMetrics
from chiffon.probes.gpus import GpuReadings, combine
from chiffon.probes.operator import OperatorWord
from chiffon.probes.sample import GpuSample
from chiffon.probes.sampler import Taken

NOTHING = Taken(GpuSample("amd"), 0.5, 0.001)


def card(
    total: float | None, free: float | None, *, index: int = 0, is_unified: bool = False
) -> Gpu:
    return Gpu(index=index, vram_total_gb=total, vram_available_gb=free, is_unified=is_unified)


def of(vendor: str, *gpus: Gpu, errors: list[str] | None = None) -> Taken:
    numbered = [gpu.model_copy(update={"index": index}) for index, gpu in enumerate(gpus)]
    return Taken(GpuSample(vendor, numbered, errors or [], source=f"{vendor}'s files"), 0.5, 0.001)


def scalars(readings: GpuReadings) -> tuple[Any, ...]:
    """Return type, total, available and the most on one GPU; they fit the contract."""
    values = {one.name: one.value for one in readings.scalars}
    ResourceMetrics(**values, gpus=readings.gpus, probe_errors=readings.errors)
    return (
        values["gpu_type"],
        values["gpu_vram_total_gb"],
        values["gpu_vram_available_gb"],
        values["gpu_vram_max_available_gb"],
    )


def combined(taken: list[Taken], memory: float | None = 64.0, **word: Any) -> GpuReadings:
    return combine(taken, OperatorWord(**word), memory)


UNREAD = of("nvidia", errors=["nvidia: Driver Not Loaded"])

COMBINED = {
    "no GPU at all": ([NOTHING], ("none", 0.0, 0.0, 0.0)),
    "nobody to ask": ([], ("none", 0.0, 0.0, 0.0)),
    "one card": ([of("amd", card(16.0, 10.0))], ("amd", 16.0, 10.0, 10.0)),
    "eight cards": ([of("nvidia", *[card(80.0, 10.0)] * 8)], ("nvidia", 640.0, 80.0, 10.0)),
    "one of two is unknown": (
        [of("nvidia", card(24.0, 20.0), card(24.0, None))],
        ("nvidia", 48.0, None, 20.0),
    ),
    "a card that cannot be read leaves its siblings": (
        [of("nvidia", card(24.0, 20.0), errors=["nvidia gpu 1: GPU is lost"])],
        ("nvidia", 24.0, 20.0, 20.0),
    ),
    "a broken driver is its vendor": ([NOTHING, UNREAD], ("nvidia", None, None, None)),
    "the vendor with most VRAM speaks": (
        [of("nvidia", card(24.0, 4.0)), of("amd", card(16.0, 16.0))],
        ("nvidia", 24.0, 4.0, 4.0),
    ),
    "memory of its own counts before the host's": (
        [of("amd", card(62.0, 50.0, is_unified=True)), of("nvidia", card(8.0, 7.0))],
        ("nvidia", 8.0, 7.0, 7.0),
    ),
    "one that can be read speaks for one that cannot": (
        [UNREAD, of("amd", card(16.0, 10.0))],
        ("amd", 16.0, 10.0, 10.0),
    ),
}


@pytest.mark.parametrize("name", COMBINED)
def test_the_scalars_speak_for_one_vendor(name: str) -> None:
    taken, expected = COMBINED[name]

    assert scalars(combined(taken)) == expected


def test_all_cards_are_listed_and_numbered_through() -> None:
    taken = [of("nvidia", card(24.0, 20.0), card(24.0, 4.0)), of("intel", card(8.0, None))]

    readings = combined(taken)

    assert [(gpu.index, gpu.vram_total_gb) for gpu in readings.gpus] == [
        (0, 24.0),
        (1, 24.0),
        (2, 8.0),
    ]
    assert readings.sample_age_seconds == 0.5


def test_a_value_that_is_unknown_has_its_reason_and_one_that_is_known_has_its_source() -> None:
    unknown = combined([UNREAD]).scalars[1]
    known = combined([of("amd", card(16.0, 10.0))]).scalars[1]

    assert (unknown.value, unknown.problem) == (None, "nvidia: Driver Not Loaded")
    assert (known.source, known.problem, known.is_overridden) == ("amd's files", None, False)


ONE = of("nvidia", card(24.0, 20.0))
TWO = of("nvidia", card(24.0, 20.0), card(24.0, 1.5))
SAID: dict[str, tuple[list[Taken], dict[str, Any], tuple[Any, ...]]] = {
    "kept for the owner, of each": (
        [TWO],
        {"kept_gpu_vram_gb": 2.0},
        ("nvidia", 48.0, 18.0, 18.0),
    ),
    "a smaller total, with what is in use": (
        [ONE],
        {"override_gpu_vram_total_gb": 16.0},
        ("nvidia", 16.0, 12.0, 12.0),
    ),
    "a total smaller than what is in use": (
        [ONE],
        {"override_gpu_vram_total_gb": 3.0},
        ("nvidia", 3.0, 0.0, 0.0),
    ),
    "what is available, whatever runs": (
        [of("intel", card(None, None))],
        {"override_gpu_vram_total_gb": 16.0, "override_gpu_vram_available_gb": 12.0},
        ("intel", 16.0, 12.0, 12.0),
    ),
    "what is available is at most the total, and less what is kept": (
        [ONE],
        {"override_gpu_vram_available_gb": 99.0, "kept_gpu_vram_gb": 4.0},
        ("nvidia", 24.0, 20.0, 20.0),
    ),
    "a total alone does not make up what is free": (
        [of("intel", card(None, None))],
        {"override_gpu_vram_total_gb": 16.0},
        ("intel", 16.0, None, None),
    ),
    "a broken driver, and what the operator knows": (
        [UNREAD],
        {"override_gpu_vram_total_gb": 24.0, "override_gpu_vram_available_gb": 20.0},
        ("nvidia", 24.0, 20.0, 20.0),
    ),
    "another vendor speaks": (
        [ONE, of("amd", card(16.0, 10.0))],
        {"override_gpu_type": "amd"},
        ("amd", 16.0, 10.0, 10.0),
    ),
    "a vendor that we cannot read": (
        [NOTHING],
        {
            "override_gpu_type": "gaudi",
            "override_gpu_vram_total_gb": 96.0,
            "override_gpu_vram_available_gb": 96.0,
        },
        ("gaudi", 96.0, 96.0, 96.0),
    ),
    "a vendor, and nothing more": (
        [NOTHING],
        {"override_gpu_type": "gaudi"},
        ("gaudi", None, None, None),
    ),
    "no GPU is offered": ([ONE], {"override_gpu_type": "none"}, ("none", 0.0, 0.0, 0.0)),
    "VRAM is said of the vendor that is spoken for, by what was detected": (
        [of("nvidia", card(8.0, 0.5)), of("intel", card(16.0, None))],
        {"override_gpu_vram_available_gb": 12.0},
        ("intel", 16.0, 12.0, 12.0),
    ),
    "a card that can be read speaks before one that cannot": (
        [UNREAD, of("intel", card(None, None))],
        {"override_gpu_vram_total_gb": 16.0, "override_gpu_vram_available_gb": 12.0},
        ("intel", 16.0, 12.0, 12.0),
    ),
    "unified memory has no more than the host has left": (
        [of("nvidia", card(120.0, 110.0, is_unified=True))],
        {},
        ("nvidia", 120.0, 64.0, 64.0),
    ),
    "VRAM of a GPU that is not there": (
        [NOTHING],
        {"override_gpu_vram_total_gb": 24.0},
        ("none", 0.0, 0.0, 0.0),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_operator_is_believed(name: str) -> None:
    taken, word, expected = SAID[name]

    assert scalars(combined(taken, **word)) == expected


@pytest.mark.parametrize(
    ("word", "overridden"),
    [
        ({}, []),
        ({"kept_gpu_vram_gb": 2.0}, []),
        ({"override_gpu_type": "nvidia"}, ["gpu_type"]),
        ({"override_gpu_type": "none"}, ["total", "available", "max_available", "gpu_type"]),
        ({"override_gpu_vram_total_gb": 8.0}, ["total", "available", "max_available"]),
        ({"override_gpu_vram_available_gb": 8.0}, ["available", "max_available"]),
    ],
)
def test_what_is_overridden_says_so(word: dict[str, Any], overridden: list[str]) -> None:
    readings = combined([ONE], **word).scalars

    names = [one.name for one in readings if one.is_overridden]
    assert [name.removeprefix("gpu_vram_").removesuffix("_gb") for name in names] == overridden


@pytest.mark.parametrize(
    ("taken", "word", "reason"),
    [
        ([of("intel", card(16.0, None))], {}, "intel gpu 0: its driver does not tell how much"),
        ([NOTHING], {"override_gpu_type": "gaudi"}, "gaudi: no driver tells its VRAM"),
        ([UNREAD], {}, "nvidia: Driver Not Loaded"),
    ],
)
def test_what_is_unknown_has_a_reason(
    taken: list[Taken], word: dict[str, Any], reason: str
) -> None:
    readings = combined(taken, **word)

    [error] = readings.errors
    assert error.startswith(reason)
    unknown = [one for one in readings.scalars if one.value is None]
    assert unknown
    assert all(one.problem == error for one in unknown)


def test_no_more_is_listed_than_the_contract_takes() -> None:
    many = of("nvidia", *[card(1.0, 1.0)] * 70, errors=["lost\n" * 200] * 70)

    readings = combined([many])

    assert scalars(readings)[1] == 70.0
    assert (len(readings.gpus), len(readings.errors)) == (64, 64)


gigabytes = st.floats(0, 1_000)
read = gigabytes.map(lambda size: round(size, 3))
cards = st.tuples(read, read).map(lambda pair: card(max(pair), min(pair)))


@given(
    gpus=st.lists(cards, min_size=1, max_size=8),
    total=st.none() | gigabytes,
    available=st.none() | gigabytes,
    kept=gigabytes,
)
def test_whatever_the_operator_says_fits_the_contract_and_keeps_what_is_kept(
    gpus: list[Gpu], total: float | None, available: float | None, kept: float
) -> None:
    readings = combined(
        [of("nvidia", *gpus)],
        override_gpu_vram_total_gb=total,
        override_gpu_vram_available_gb=available,
        kept_gpu_vram_gb=kept,
    )

    _, all_total, all_free, most = scalars(readings)
    assert 0 <= most <= all_free <= all_total
    for gpu in readings.gpus:
        assert gpu.vram_total_gb is not None
        assert gpu.vram_available_gb is not None
        assert gpu.vram_available_gb <= max(gpu.vram_total_gb - kept, 0) + 0.001
