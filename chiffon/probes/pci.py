"""Where the kernel shows GPUs: the PCI bus, and the cards of the DRM drivers."""

import time
from collections.abc import Callable
from pathlib import Path

from chiffon.contract.messages import Gpu
from chiffon.errors import ProbeError
from chiffon.probes.sample import GpuSample, number, text

LOOK_AGAIN_SECONDS = 60.0


class Displays:
    """The display controllers (PCI class 0x03) of one vendor, driver or no driver.

    A broken driver is not "no GPU": the bus still shows the card. A bus of a server has hundreds
    of devices, so it is looked at once a minute at most.

    Args:
        root: Where ``/sys`` is.
        vendor_id: The PCI vendor.
    """

    def __init__(self, root: Path, vendor_id: int) -> None:
        self._folder = root / "sys/bus/pci/devices"
        self._vendor_id = vendor_id
        self._found: list[Path] = []
        self._looked = float("-inf")

    def read(self) -> list[Path]:
        """Return the folders of the devices, in the order of their addresses.

        Without those that are set aside for a virtual machine (driver ``vfio-pci``), and without
        the parts of a GPU that are made for them (virtual functions).
        """
        if time.monotonic() - self._looked >= LOOK_AGAIN_SECONDS:
            self._found = [path for path in sorted(self._folder.glob("*")) if self._is_ours(path)]
            self._looked = time.monotonic()
        return self._found

    def _is_ours(self, device: Path) -> bool:
        try:
            is_display = ((number(device / "class") or 0) >> 16) == 0x03
        except ProbeError:
            return False
        if not is_display or (device / "physfn").exists():
            return False
        return _vendor(device) == self._vendor_id and driver(device) != "vfio-pci"


class CardProbe:
    """Reads the GPUs of one vendor from the files of its DRM driver.

    Args:
        vendor: As ``gpu_type`` names it.
        vendor_id: The PCI vendor.
        source: The files that the memory is read from, for people.
        is_integrated: Tells from the folder of a device whether it shares the host's memory.
        read_card: Reads one card: its index, its folder, whether it is integrated. May raise
            ``ProbeError``.
        root: Where ``/sys`` is; tests pass a captured tree.
        integrated_gpus: Whether integrated GPUs count.
    """

    def __init__(
        self,
        vendor: str,
        vendor_id: int,
        source: str,
        *,
        is_integrated: Callable[[Path], bool],
        read_card: Callable[[int, Path, bool], Gpu],
        root: Path,
        integrated_gpus: bool,
    ) -> None:
        self._vendor = vendor
        self._vendor_id = vendor_id
        self._source = source
        self._is_integrated = is_integrated
        self._read_card = read_card
        self._root = root
        self._integrated_gpus = integrated_gpus
        self._displays = Displays(root, vendor_id)

    def read(self) -> GpuSample:
        """Return the cards in the order of their numbers; an error for each that is unreadable.

        That includes what is on the PCI bus and has no driver that shows a card for it.
        """
        sample = GpuSample(self._vendor, source=self._source)
        cards = {card: card / "device" for card in drm_cards(self._root, self._vendor_id)}
        shown = {device.resolve() for device in cards.values()}
        for card, device in cards.items():
            if self._counts(device, sample):
                try:
                    index = len(sample.gpus) + len(sample.errors)
                    gpu = self._read_card(index, card, self._is_integrated(device))
                    sample.gpus.append(gpu)
                except ProbeError as error:
                    sample.errors.append(f"{self._named(device)}: {error}")
        for device in self._displays.read():
            if device.resolve() not in shown and self._counts(device, sample):
                problem = f"driver {driver(device) or 'none'} shows no card for it"
                sample.errors.append(f"{self._named(device)}: {problem}")
        return sample

    def _counts(self, device: Path, sample: GpuSample) -> bool:
        if self._integrated_gpus or not self._is_integrated(device):
            return True
        sample.notes.append(
            f"{self._named(device)} is integrated and left out; CHIFFON_INTEGRATED_GPUS=true"
            " counts it"
        )
        return False

    def _named(self, device: Path) -> str:
        return f"{self._vendor} gpu {device.resolve().name}"


def drm_cards(root: Path, vendor_id: int) -> list[Path]:
    """Return the folders of one vendor's cards: no connectors (card0-DP-1), no render nodes."""
    cards = [path for path in (root / "sys/class/drm").glob("card*") if path.name[4:].isdigit()]
    cards.sort(key=lambda path: int(path.name[4:]))
    return [card for card in cards if _vendor(card / "device") == vendor_id]


def pci_name(device: Path) -> str | None:
    """Return the vendor and device numbers, as lspci(8) takes them, for want of a name."""
    numbers = [text(device / name) for name in ("vendor", "device")]
    if None in numbers:
        return None
    return "pci " + ":".join(str(one).removeprefix("0x") for one in numbers)


def driver(device: Path) -> str | None:
    """Return the name of the driver that has a device, ``None`` if none has."""
    link = device / "driver"
    return link.resolve().name if link.is_symlink() else None


def _vendor(device: Path) -> int | None:
    try:
        return number(device / "vendor")
    except ProbeError:
        return None
