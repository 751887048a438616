"""Where and how a step runs. It changes speed and memory, not what is computed: never in a key."""

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """workers: processes that train side by side. cpus_per_worker: also their torch threads.
    gpus_per_worker: 0 (CPU) or 1. micro_batch: packed rows in one forward pass.
    gradient_checkpointing: recompute activations in the backward pass, for less memory."""

    workers: int = 1
    cpus_per_worker: int = 2
    gpus_per_worker: int = 0
    micro_batch: int = 4
    gradient_checkpointing: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker else "cpu"

    @property
    def room(self) -> int | None:
        """How many trainings fit on this machine; None on a cluster, which may grow."""
        if os.environ.get("RAY_ADDRESS"):
            return None
        if self.gpus_per_worker:
            from torch.cuda import device_count  # slow to import, and tasks without one use this

            return max(1, device_count() // (self.workers * self.gpus_per_worker))
        return max(1, (os.cpu_count() or 1) // (self.workers * self.cpus_per_worker))

    def spool(self, work: Path) -> Path:
        """Where activations wait, batch by batch: those of batches of another size do not count."""
        return work / f"batches-of-{self.micro_batch}"

    def peak_memory(self) -> int:
        """Most bytes this process held: on the GPU if it used one, else resident memory."""
        if self.gpus_per_worker:
            from torch import cuda

            if cuda.is_initialized():
                return cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Count this process's resident memory anew, on Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
