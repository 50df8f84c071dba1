"""What a GPU source returns: its cards, and what it could not read."""

from dataclasses import dataclass, field
from pathlib import Path

from chiffon.errors import ProbeError
from chiffon.messages import Gpu

GIB = 2**30


@dataclass(frozen=True)
class GpuSample:
    """The cards of one vendor.

    Args:
        vendor: As ``gpu_type`` names it; ``None`` where not even that is known.
        gpus: In the driver's order; empty where there are none, or none could be read.
        errors: One line each for what is present and could not be read.
    """

    vendor: str | None
    gpus: list[Gpu] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def is_present(self) -> bool:
        """Whether the host has hardware of this vendor, readable or not."""
        return bool(self.gpus or self.errors)

    @property
    def total_gb(self) -> float | None:
        """VRAM over all cards in GiB; unknown as soon as one card's is."""
        return _sum([gpu.vram_total_gb for gpu in self.gpus], self.errors)

    @property
    def available_gb(self) -> float | None:
        """Free VRAM over all cards that could be read, in GiB; unknown where none could."""
        return _sum([gpu.vram_available_gb for gpu in self.gpus], self.errors)


def to_gb(size_bytes: int) -> float:
    """Return GiB, to the nearest thousandth (about 1 MiB)."""
    return round(size_bytes / GIB, 3)


def printable(said: str, longest: int = 255) -> str:
    """Return what a driver said as the wire contract takes it: printable, on one line."""
    return "".join(letter if letter.isprintable() else " " for letter in said)[:longest]


def text(path: Path) -> str | None:
    """Return what a one-line file says, ``None`` where the driver does not have that file.

    Raises:
        ProbeError: It is there and cannot be read.
    """
    try:
        return printable(path.read_text().strip())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path}: {error}") from None


def number(path: Path) -> int | None:
    """Return the number in a one-line file, ``None`` where the driver does not have that file.

    Raises:
        ProbeError: It is there and is not a number.
    """
    content = text(path)
    if content is None:
        return None
    try:
        return int(content, 0)
    except ValueError:
        raise ProbeError(f"{path}: {content[:32]!r} is not a number") from None


def pci_displays(sysfs: Path, vendor_id: int) -> list[Path]:
    """Return the display controllers (PCI class 0x03) of one vendor, driver or no driver."""
    found = []
    for device in sorted(sysfs.glob("bus/pci/devices/*")):
        try:
            is_display = ((number(device / "class") or 0) >> 16) == 0x03
            if is_display and number(device / "vendor") == vendor_id:
                found.append(device)
        except ProbeError:
            continue
    return found


def drm_cards(sysfs: Path, vendor_id: int) -> list[Path]:
    """Return the device folders of one vendor's cards: no connectors, no render nodes."""
    cards = [path for path in sysfs.glob("class/drm/card*") if path.name[4:].isdigit()]
    cards.sort(key=lambda path: int(path.name[4:]))
    devices = [card / "device" for card in cards]
    return [device for device in devices if number(device / "vendor") == vendor_id]


def _sum(values: list[float | None], errors: list[str]) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or (errors and not known):
        return None
    return round(sum(known), 3)
