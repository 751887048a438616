"""Where and how a step runs. It changes speed and memory, not what is computed: never in a key."""

import contextlib
import os
import resource
from collections.abc import Iterable, Mapping
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
        return max(1, self.fits([self.machine()]))

    def fits(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """How many trainings run at a time on nodes of so many CPUs and GPUs."""
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        of_node = [min(node.get(n, 0) // x for n, x in asked.items() if x) for node in nodes]
        return int(sum(of_node)) // self.workers

    def machine(self) -> dict[str, float]:
        """The CPUs of this machine, and its GPUs if they are asked for."""
        if not self.gpus_per_worker:
            return {"CPU": os.cpu_count() or 1}
        from torch.cuda import device_count  # slow to import, and tasks without one use this

        return {"CPU": os.cpu_count() or 1, "GPU": device_count()}

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
