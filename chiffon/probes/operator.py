"""The operator's word: what is kept for the host's owner, and what counts instead of a probe."""

from dataclasses import dataclass

from chiffon.contract.messages import Kept


@dataclass(frozen=True, kw_only=True)
class OperatorWord:
    """What the operator says of this host; nothing by default. GPU sizes are of each GPU.

    What is kept is subtracted from what is available, on top of what runs now. What is
    overridden is believed: totals and usable cores replace what is detected, while what is in use
    is still measured; only ``override_gpu_vram_available_gb`` stands as it is, for cards whose
    use cannot be read.

    Args:
        kept_cpu_cores: CPUs, possibly a fraction.
        kept_memory_gb: GiB.
        kept_gpu_vram_gb: GiB.
        override_cpu_cores: CPUs that jobs may use, possibly a fraction.
        override_cpu_cores_physical: Physical cores.
        override_memory_total_gb: GiB.
        override_gpu_type: A vendor: its cards are spoken for. ``none``: GPUs are not looked at.
        override_gpu_vram_total_gb: GiB.
        override_gpu_vram_available_gb: GiB, whatever runs.
        integrated_gpus: Whether GPUs that share the host's memory count, too.
    """

    kept_cpu_cores: float = 0.0
    kept_memory_gb: float = 0.0
    kept_gpu_vram_gb: float = 0.0
    override_cpu_cores: float | None = None
    override_cpu_cores_physical: int | None = None
    override_memory_total_gb: float | None = None
    override_gpu_type: str | None = None
    override_gpu_vram_total_gb: float | None = None
    override_gpu_vram_available_gb: float | None = None
    integrated_gpus: bool = False

    @property
    def kept(self) -> Kept | None:
        """What is kept, as a heartbeat tells it; ``None`` if nothing is."""
        kept = Kept(
            cpu_cores=self.kept_cpu_cores,
            memory_gb=self.kept_memory_gb,
            gpu_vram_gb=self.kept_gpu_vram_gb,
        )
        return None if kept == Kept() else kept


NOTHING_SAID = OperatorWord()
