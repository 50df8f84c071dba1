"""Intel's discrete GPUs, from sysfs: that they are there, and little else.

How much memory is in use needs CAP_PERFMON (the xe and i915 perf interfaces), so it is unknown to
an ordinary agent. Integrated GPUs share the host's memory and are left out: they sit at the fixed
PCI address 00:02.0, and would make every laptop a GPU host.
"""

from pathlib import Path

from chiffon.errors import ProbeError
from chiffon.messages import Gpu
from chiffon.probes.sample import GpuSample, drm_cards, number, to_gb

VENDOR = "intel"
PCI_VENDOR = 0x8086
_INTEGRATED = "0000:00:02.0"


def read(sysfs: Path = Path("/sys")) -> GpuSample:
    """Read every discrete Intel GPU under ``sysfs``.

    Args:
        sysfs: Mount point of sysfs; tests pass a captured tree.

    Returns:
        One ``Gpu`` a card, in card order, with free VRAM unknown.
    """
    gpus: list[Gpu] = []
    errors: list[str] = []
    cards = drm_cards(sysfs, PCI_VENDOR)
    discrete = [card for card in cards if card.resolve().name != _INTEGRATED]
    for index, device in enumerate(discrete):
        try:
            total = number(device / "lmem_total_bytes")
        except ProbeError as error:
            errors.append(f"intel gpu {index}: {error}")
            continue
        total_gb = None if total is None else to_gb(total)
        gpus.append(Gpu(index=index, vram_total_gb=total_gb))
    return GpuSample(VENDOR, gpus, errors)
