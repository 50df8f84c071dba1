"""The GPUs of all vendors as the fields of the contract, with the operator's word applied.

The scalar fields speak for one vendor: the one with most VRAM of its own, since a job runs on the
cards of one vendor, and a sum over several would promise what no job can take. All cards are in
``gpus``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chiffon.messages import Gpu
from chiffon.probes.operator import OperatorWord
from chiffon.probes.sample import GpuSample, Reading, printable
from chiffon.probes.sampler import Taken

MOST = 64
"""As many cards, and as many lines of errors, as the contract takes."""


@dataclass(frozen=True)
class GpuReadings:
    """What a heartbeat says of GPUs; ``notes`` are for people only."""

    scalars: list[Reading]
    gpus: list[Gpu]
    errors: list[str]
    notes: list[str]
    sample_age_seconds: float | None


def combine(taken: Sequence[Taken], word: OperatorWord) -> GpuReadings:
    """Return the GPU fields of the newest samples of all vendors.

    VRAM is unknown as soon as that of one card is; a card that cannot be read at all is left out
    of the sum, since nothing can run on it. Without any GPU all is a known zero.
    """
    vendor = word.override_gpu_type
    if vendor == "none":
        return GpuReadings(_no_gpu("CHIFFON_OVERRIDE_GPU_TYPE", True), [], [], [], None)
    notes = [note for one in taken for note in one.sample.notes]
    present = [one for one in taken if one.sample.is_present]
    if vendor is not None and vendor not in {one.sample.vendor for one in present}:
        present.append(Taken(GpuSample(vendor, source="CHIFFON_OVERRIDE_GPU_TYPE"), None, None))
    if not present:
        took = max((one.took_seconds or 0.0 for one in taken), default=0.0)
        return GpuReadings(_no_gpu("no GPU is on the PCI bus", False, took), [], [], notes, None)
    cards = [_cards(one.sample, word) for one in present]
    first = max(
        range(len(present)), key=lambda at: _weight(present[at].sample.vendor, cards[at], vendor)
    )
    age = present[first].age_seconds
    return GpuReadings(
        _scalars(present[first], cards[first], word),
        _numbered(cards)[:MOST],
        [printable(line, 512) for one in present for line in one.sample.errors][:MOST],
        notes,
        None if age is None else round(age, 3),
    )


def _cards(sample: GpuSample, word: OperatorWord) -> list[Gpu]:
    """Return the cards as the operator has them.

    Where none can be read but the operator says how much VRAM there is, there is one.
    """
    is_said = (word.override_gpu_vram_total_gb, word.override_gpu_vram_available_gb) != (None, None)
    gpus = sample.gpus or ([Gpu(index=0)] if is_said else [])
    return [_as_said(gpu, word) for gpu in gpus]


def _as_said(gpu: Gpu, word: OperatorWord) -> Gpu:
    total, free = gpu.vram_total_gb, gpu.vram_available_gb
    if word.override_gpu_vram_total_gb is not None:
        used = None if total is None or free is None else total - free
        total = word.override_gpu_vram_total_gb
        free = None if used is None else total - used
    if word.override_gpu_vram_available_gb is not None:
        free = word.override_gpu_vram_available_gb
        free = free if total is None else min(free, total)
    if free is not None:
        free = round(max(free - word.reserved_gpu_vram_gb, 0.0), 3)
    return gpu.model_copy(update={"vram_total_gb": total, "vram_available_gb": free})


def _weight(vendor: str, gpus: Sequence[Gpu], wanted: str | None) -> tuple[bool, float, float]:
    own = sum(gpu.vram_total_gb or 0.0 for gpu in gpus if not gpu.is_unified)
    return vendor == wanted, own, sum(gpu.vram_total_gb or 0.0 for gpu in gpus)


def _scalars(taken: Taken, gpus: Sequence[Gpu], word: OperatorWord) -> list[Reading]:
    totals = [gpu.vram_total_gb for gpu in gpus]
    frees = [gpu.vram_available_gb for gpu in gpus]
    is_total_said = word.override_gpu_vram_total_gb is not None
    is_free_said = is_total_said or word.override_gpu_vram_available_gb is not None
    values = [
        ("gpu_vram_total_gb", _sum(totals), is_total_said),
        ("gpu_vram_available_gb", _sum(frees), is_free_said),
        (
            "gpu_vram_max_available_gb",
            max((free for free in frees if free is not None), default=None),
            is_free_said,
        ),
        ("gpu_type", taken.sample.vendor, word.override_gpu_type is not None),
    ]
    problem = "; ".join(taken.sample.errors) or None
    return [
        Reading(
            name,
            value,
            _source(name, taken.sample.source, word),
            taken.took_seconds or 0.0,
            is_overridden,
            problem if value is None else None,
        )
        for name, value, is_overridden in values
    ]


def _source(name: str, detected: str, word: OperatorWord) -> str:
    if name == "gpu_type":
        return "CHIFFON_OVERRIDE_GPU_TYPE" if word.override_gpu_type else detected
    parts = [detected]
    if word.override_gpu_vram_total_gb is not None:
        parts.append("CHIFFON_OVERRIDE_GPU_VRAM_TOTAL_GB")
    if name == "gpu_vram_total_gb":
        return ", ".join(parts)
    if word.override_gpu_vram_available_gb is not None:
        parts = ["CHIFFON_OVERRIDE_GPU_VRAM_AVAILABLE_GB"]
    if word.reserved_gpu_vram_gb:
        parts.append(f"{word.reserved_gpu_vram_gb:g} GiB of each reserved")
    return ", ".join(parts)


def _no_gpu(source: str, is_overridden: bool, seconds: float = 0.0) -> list[Reading]:
    vram = ("gpu_vram_total_gb", "gpu_vram_available_gb", "gpu_vram_max_available_gb")
    zeros = [Reading(name, 0.0, source, seconds, is_overridden) for name in vram]
    return [*zeros, Reading("gpu_type", "none", source, seconds, is_overridden)]


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if known and len(known) == len(values) else None


def _numbered(cards: Sequence[list[Gpu]]) -> list[Gpu]:
    """Number the cards of several vendors through; each vendor counts its own from 0."""
    gpus = [gpu for own in cards for gpu in own]
    if len(cards) < 2:
        return gpus
    return [gpu.model_copy(update={"index": index}) for index, gpu in enumerate(gpus)]
