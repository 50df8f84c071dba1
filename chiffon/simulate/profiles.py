"""Simulated hosts: a few kinds of machines that people have, with readings that wander."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from chiffon.contract.messages import AgentType, Gpu, ResourceMetrics

STEP = 0.05
"""By how much of the whole a reading moves between two heartbeats, at most."""


@dataclass(frozen=True)
class Profile:
    """One kind of host; sizes are GiB, ``share`` is its weight in the fleet."""

    name: str
    share: float
    agent_type: AgentType
    cores: int
    memory_gb: float
    gpu_type: str = "none"
    gpu_name: str = ""
    gpus: int = 0
    vram_gb: float = 0.0


PROFILES: Sequence[Profile] = (
    Profile("desk", 0.45, "desktop", 16, 64.0, "nvidia", "NVIDIA GeForce RTX 4090", 1, 24.0),
    Profile("small", 0.15, "desktop", 8, 32.0, "nvidia", "NVIDIA GeForce RTX 3060", 1, 12.0),
    Profile("red", 0.10, "desktop", 24, 64.0, "amd", "AMD Radeon RX 7900 XTX", 1, 24.0),
    Profile("station", 0.15, "research", 32, 256.0, "nvidia", "NVIDIA L40S", 2, 45.0),
    Profile("server", 0.05, "research", 128, 1024.0, "nvidia", "NVIDIA A100-SXM4-80GB", 8, 80.0),
    Profile("plain", 0.10, "infra", 64, 128.0),
)


def profile_for(chance: Random) -> Profile:
    """Return one of the profiles, as often as its share says."""
    [profile] = chance.choices(PROFILES, [one.share for one in PROFILES])
    return profile


class Host:
    """A host of one profile; each reading is a small step from the last one.

    Args:
        name: Part of the GPUs' uuids.
        profile: Its kind.
        chance: Where its randomness is from.
    """

    def __init__(self, name: str, profile: Profile, chance: Random) -> None:
        self._name = name
        self._profile = profile
        self._chance = chance
        self._busy = chance.random()
        self._memory = chance.uniform(0.1, 0.9)
        self._vram = [chance.random() for _ in range(profile.gpus)]

    def read(self) -> ResourceMetrics:
        """Return what is free now."""
        self._busy = self._wandered(self._busy)
        self._memory = self._wandered(self._memory)
        self._vram = [self._wandered(used) for used in self._vram]
        cores, busy = self._profile.cores, self._busy
        gpus = [self._gpu(index, used) for index, used in enumerate(self._vram)]
        free = [gpu.vram_available_gb or 0.0 for gpu in gpus]
        return ResourceMetrics(
            cpu_percent=round(100 * busy, 1),
            cpu_cores_physical=cores // 2,
            cpu_cores_available=int(cores * (1 - busy)),
            cpu_load_1min=round(cores * busy, 2),
            cpu_load_5min=round(cores * busy, 2),
            memory_percent=round(100 * self._memory, 1),
            memory_available_gb=round(self._profile.memory_gb * (1 - self._memory), 3),
            gpu_vram_total_gb=self._profile.vram_gb * len(gpus),
            gpu_vram_available_gb=round(sum(free), 3),
            gpu_vram_max_available_gb=max(free, default=0.0),
            gpu_type=self._profile.gpu_type,
            gpus=gpus,
        )

    def _gpu(self, index: int, used: float) -> Gpu:
        return Gpu(
            uuid=f"GPU-{self._name}-{index}",
            index=index,
            name=self._profile.gpu_name,
            vram_total_gb=self._profile.vram_gb,
            vram_available_gb=round(self._profile.vram_gb * (1 - used), 3),
            utilization_percent=round(100 * used, 1),
        )

    def _wandered(self, value: float) -> float:
        return min(max(value + self._chance.uniform(-STEP, STEP), 0.0), 1.0)
