"""Seconds and memory to recover an adapter with the shapes of LLaMA-3.1-70B at ratio 0.85.

python -m tests.benchmarks.recovery
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from loram.adapter import AdapterConfig, recover
from loram.plan import meta_model
from loram.prune import PruneConfig, choose
from loram.pruned import pruned_config
from loram.taylor import random_scores
from pipelines.shapes import SHAPES
from tests.benchmarks import keep


def main() -> None:
    """Make the adapter of the pruned shapes, then recover it once."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    full, lora = SHAPES["llama31-70b"], AdapterConfig()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for directory in ("base", "pruned", "adapter"):
            (root / directory).mkdir()
        full.save_pretrained(root / "base")
        kept = choose(random_scores(full, 0), full, PruneConfig(ratio=0.85))
        kept.save(root / "pruned")
        tensors = {}
        for module, linear in meta_model(pruned_config(full, kept)).named_modules():
            if isinstance(linear, nn.Linear) and module.rsplit(".", 1)[-1] in lora.targets:
                key = f"base_model.model.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.rand(lora.r, linear.in_features)
                tensors[f"{key}.lora_B.weight"] = torch.rand(linear.out_features, lora.r)
        save_file(tensors, root / "adapter" / "adapter_model.safetensors")
        LoraConfig(r=lora.r, lora_alpha=lora.alpha).save_pretrained(root / "adapter")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            seconds, peak = fresh.submit(measured, root).result()
        adapter = (root / "recovered" / "adapter_model.safetensors").stat().st_size
        keep(
            "recovery",
            shapes="llama31-70b",
            ratio=0.85,
            seconds=round(seconds, 2),
            recovered_bytes=adapter,
            pruned_bytes=(root / "adapter" / "adapter_model.safetensors").stat().st_size,
            peak_over_adapter=round(peak / adapter, 2),
        )


def measured(root: Path) -> tuple[float, int]:
    """Seconds of the recovery, and bytes resident at its peak over those before it."""
    before = _peak()
    started = time.perf_counter()
    recover(root / "adapter", root / "pruned", root / "base", root / "recovered")
    return time.perf_counter() - started, _peak() - before


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
