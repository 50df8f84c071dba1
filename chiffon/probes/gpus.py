"""The GPUs of all vendors as the fields of the contract, with the operator's word applied.

The scalar fields speak for one vendor: the one with most VRAM of its own, since a job runs on the
cards of one vendor, and a sum over several would promise what no job can take. All cards are in
``gpus``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from chiffon.contract.messages import Gpu
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
    used: dict[str, dict[int, int | None]] = field(default_factory=dict)


def combine(
    taken: Sequence[Taken], word: OperatorWord, memory_available_gb: float | None
) -> GpuReadings:
    """Return the GPU fields of the newest samples of all vendors.

    VRAM is unknown as soon as that of one card is; a card that cannot be read at all is left out
    of the sum, since nothing can run on it. Without any GPU all is a known zero.

    Args:
        taken: A sample of each vendor.
        word: What the operator says; overridden VRAM is that of the vendor that is spoken for.
        memory_available_gb: What the host has left; unified memory has no more than that.
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
        return GpuReadings(_no_gpu("no GPU that counts", False, took), [], [], notes, None)
    first = max(present, key=lambda one: _weight(one.sample, vendor))
    may_stand_in = len(present) == 1 or vendor is not None
    cards = {
        one.sample.vendor: [
            _less_kept(gpu, word, memory_available_gb).model_copy(
                update={"gpu_type": one.sample.vendor}
            )
            for gpu in (
                _as_said(one.sample, word, may_stand_in) if one is first else one.sample.gpus
            )
        ]
        for one in present
    }
    errors = [
        line
        for one in present
        for line in one.sample.errors or _unknown(one.sample.vendor, cards[one.sample.vendor])
    ]
    age = first.age_seconds
    return GpuReadings(
        _scalars(first, cards[first.sample.vendor], word),
        _numbered(list(cards.values()))[:MOST],
        [printable(line, 512) for line in errors][:MOST],
        notes,
        None if age is None else round(age, 3),
        {uuid: each for one in present for uuid, each in one.sample.used.items()},
    )


def _weight(sample: GpuSample, wanted: str | None) -> tuple[bool, float, float, bool]:
    own = sum(gpu.vram_total_gb or 0.0 for gpu in sample.gpus if not gpu.is_unified)
    shared = sum(gpu.vram_total_gb or 0.0 for gpu in sample.gpus if gpu.is_unified)
    return sample.vendor == wanted, own, shared, bool(sample.gpus)


def _as_said(sample: GpuSample, word: OperatorWord, may_stand_in: bool) -> list[Gpu]:
    """Return the cards with the operator's VRAM; one, if none can be read but all is said."""
    total_said, free_said = word.override_gpu_vram_total_gb, word.override_gpu_vram_available_gb
    is_said = (total_said, free_said) != (None, None)
    said = []
    for gpu in sample.gpus or ([Gpu(index=0)] if is_said and may_stand_in else []):
        total, free = gpu.vram_total_gb, gpu.vram_available_gb
        if total_said is not None:
            free = None if total is None or free is None else total_said - (total - free)
            total = round(total_said, 3)
        if free_said is not None:
            free = free_said
        said.append(gpu.model_copy(update={"vram_total_gb": total, "vram_available_gb": free}))
    return said


def _less_kept(gpu: Gpu, word: OperatorWord, memory_available_gb: float | None) -> Gpu:
    free = gpu.vram_available_gb
    if free is None:
        return gpu
    bounds = [free - word.kept_gpu_vram_gb]
    if gpu.vram_total_gb is not None:
        bounds.append(gpu.vram_total_gb - word.kept_gpu_vram_gb)
    if gpu.is_unified and memory_available_gb is not None:
        bounds.append(memory_available_gb)
    return gpu.model_copy(update={"vram_available_gb": max(round(min(bounds), 3), 0.0)})


def _unknown(vendor: str, gpus: Sequence[Gpu]) -> list[str]:
    """Return why VRAM is unknown where the driver works and does not tell."""
    how = "CHIFFON_OVERRIDE_GPU_VRAM_TOTAL_GB and _AVAILABLE_GB can"
    if not gpus:
        return [f"{vendor}: no driver tells its VRAM; {how}"]
    return [
        f"{vendor} gpu {gpu.index}: its driver does not tell how much VRAM is free; {how}"
        for gpu in gpus
        if gpu.vram_total_gb is None or gpu.vram_available_gb is None
    ]


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
    problem = "; ".join(taken.sample.errors or _unknown(taken.sample.vendor, gpus)) or None
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
    if word.kept_gpu_vram_gb:
        parts.append(f"{word.kept_gpu_vram_gb:g} GiB of each kept")
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
