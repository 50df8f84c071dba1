"""AMD GPUs, from the amdgpu driver's sysfs files.

Source: Linux Documentation/gpu/amdgpu/driver-misc.rst (``mem_info_*``) and thermal.rst
(``gpu_busy_percent``), amdgpu_pm.c and amdgpu_vram_mgr.c of 6.12. No vendor library, no root.

A GPU inside a processor (APU) has no memory of its own: the firmware carves "VRAM" out of the
host's memory, often 512 MiB, and the driver lets it use about half of the rest through its
translation table (GTT). A job gets its memory from one of the two. Since Linux 6.10 ROCm takes
GTT where that is the larger one, and where an owner made the carve-out the larger one it is what
they meant to be used: so the larger one counts, never the sum. GTT is memory that the host may
have given away meanwhile, so no more of it is available than MemAvailable.
"""

from pathlib import Path

import psutil

from chiffon.contract.messages import Gpu
from chiffon.errors import ProbeError
from chiffon.probes.pci import CardProbe, pci_name
from chiffon.probes.sample import number, text, to_gb


def probe(root: Path = Path("/"), integrated_gpus: bool = False) -> CardProbe:
    """Return a probe of every AMD GPU; those of APUs count only with ``integrated_gpus``."""
    return CardProbe(
        "amd",
        0x1002,
        "mem_info_* in /sys/class/drm/card*/device",
        is_integrated=_is_apu,
        read_card=_read_card,
        root=root,
        integrated_gpus=integrated_gpus,
    )


def _read_card(index: int, card: Path, is_apu: bool) -> Gpu:
    device = card / "device"
    total, free = _pool(device, "vram")
    is_gtt = False
    if is_apu:
        gtt_total, gtt_free = _pool(device, "gtt")
        is_gtt = (gtt_total or 0) > (total or 0)
        if is_gtt:
            left = psutil.virtual_memory().available
            total, free = gtt_total, None if gtt_free is None else min(gtt_free, left)
    return Gpu(
        uuid=text(device / "unique_id"),
        index=index,
        name=text(device / "product_name") or pci_name(device),
        vram_total_gb=None if total is None else to_gb(total),
        vram_available_gb=None if free is None else to_gb(free),
        utilization_percent=_utilization(device),
        is_unified=is_gtt,
    )


def _pool(device: Path, name: str) -> tuple[int | None, int | None]:
    total = number(device / f"mem_info_{name}_total")
    used = number(device / f"mem_info_{name}_used")
    # The driver has been seen to report more free than there is: used wraps below zero.
    free = None if total is None or used is None else min(max(total - used, 0), total)
    return total, free


def _utilization(device: Path) -> float | None:
    try:
        # Asking would wake a card that sleeps, and keep it awake; its memory is told without.
        if text(device / "power/runtime_status") == "suspended":
            return 0.0
        busy = number(device / "gpu_busy_percent")
    except ProbeError:  # while the card resets, for one; its memory is told all the same
        return None
    return None if busy is None else float(min(max(busy, 0), 100))


def _is_apu(device: Path) -> bool:
    """Tell an APU by its PCI device id: they have ranges of their own.

    So it is for all that amdgpu_drv.c and the PCI id database list as APU, from Kaveri (0x1304)
    and Kabini (0x9830) on; the discrete GPUs of that driver are from 0x6600 to 0x75ff.
    """
    try:
        device_id = number(device / "device") or 0
    except ProbeError:
        return False
    return 0 < device_id < 0x2000 or 0x9800 <= device_id < 0x9A00
