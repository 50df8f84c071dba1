"""AMD GPUs, from the amdgpu driver's sysfs files.

Source: Linux Documentation/gpu/amdgpu/driver-misc.rst (``mem_info_vram_*``) and thermal.rst
(``gpu_busy_percent``). No vendor library, no root.
"""

from pathlib import Path

from chiffon.errors import ProbeError
from chiffon.messages import Gpu
from chiffon.probes.sample import GpuSample, drm_cards, number, text, to_gb

VENDOR = "amd"
PCI_VENDOR = 0x1002


def read(sysfs: Path = Path("/sys")) -> GpuSample:
    """Read every AMD GPU under ``sysfs``.

    Args:
        sysfs: Mount point of sysfs; tests pass a captured tree.

    Returns:
        One ``Gpu`` a card, in card order; ``None`` for a value whose file the driver omits.
    """
    gpus: list[Gpu] = []
    errors: list[str] = []
    for index, device in enumerate(drm_cards(sysfs, PCI_VENDOR)):
        try:
            gpus.append(_read_one(index, device))
        except ProbeError as error:
            errors.append(f"amd gpu {index}: {error}")
    return GpuSample(VENDOR, gpus, errors)


def _read_one(index: int, device: Path) -> Gpu:
    total = number(device / "mem_info_vram_total")
    used = number(device / "mem_info_vram_used")
    busy = number(device / "gpu_busy_percent")
    # The driver has been seen to report more free than there is: used wraps below zero.
    free = None if total is None or used is None else min(max(total - used, 0), total)
    return Gpu(
        uuid=text(device / "unique_id"),
        index=index,
        name=text(device / "product_name") or None,
        vram_total_gb=None if total is None else to_gb(total),
        vram_available_gb=None if free is None else to_gb(free),
        utilization_percent=None if busy is None else float(busy),
    )
