"""Intel's GPUs, from sysfs: that they are there, and sometimes how much memory they have.

How much is in use needs CAP_PERFMON, so it is unknown to an ordinary agent. The total stands in
``tile*/physical_vram_size_bytes`` of the device (driver xe, where it publishes it: intel-gpu-tools
reads it there) or in ``lmem_total_bytes`` of the card (Intel's own build of i915); the i915 of
mainline tells neither. Integrated GPUs share the host's memory; they sit at the fixed PCI address
00:02.0.
"""

from pathlib import Path

from chiffon.contract.messages import Gpu
from chiffon.probes.pci import CardProbe, pci_name
from chiffon.probes.sample import number, to_gb

_INTEGRATED = "0000:00:02.0"


def probe(root: Path = Path("/"), integrated_gpus: bool = False) -> CardProbe:
    """Return a probe of every Intel GPU; those of processors count only if ``integrated_gpus``."""
    return CardProbe(
        "intel",
        0x8086,
        "physical_vram_size_bytes or lmem_total_bytes in /sys/class/drm/card*",
        is_integrated=_is_integrated,
        read_card=_read_card,
        root=root,
        integrated_gpus=integrated_gpus,
    )


def _read_card(index: int, card: Path, is_integrated: bool) -> Gpu:
    tiles = sorted((card / "device").glob("tile*/physical_vram_size_bytes"))
    sizes = [number(path) for path in [*tiles] or [card / "lmem_total_bytes"]]
    known = [size for size in sizes if size is not None]
    return Gpu(
        index=index,
        name=pci_name(card / "device"),
        vram_total_gb=to_gb(sum(known)) if known else None,
        is_unified=is_integrated,
    )


def _is_integrated(device: Path) -> bool:
    return device.resolve().name == _INTEGRATED
