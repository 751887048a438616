"""Peak anonymous memory of pruning: over depth, and of a checkpoint in the shape of LLaMA-2-13B.

    python -m tests.benchmarks.memory [--only depth|13b]

Random weights in bf16, written part by part. Over depth: hidden 768, 2,048 neurons, 4, 16 and 40
layers, 4 rows x 128 tokens. 13B: 26 GB in shards under the temporary directory, which must have
45 GB free; 2 rows x 128 tokens; deleted at the end. Each pruning runs in a process of its own.
"""

import argparse
import multiprocessing
import shutil
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import LlamaConfig

from loram.loss import Batch
from loram.prune import PruneConfig, choose, prune, score
from loram.pruned import meta_model
from loram.shards import write_index, write_part
from loram.sparse import sparsify
from pipelines.shapes import SHAPES
from tests.benchmarks import keep, kept

WIDTH = {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 4096}
WIDTH |= {"num_attention_heads": 12, "num_key_value_heads": 12}
LENGTH = 128


def main() -> None:
    """Depth first; it takes minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("depth", "13b"))
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if only != "13b":
            for layers in (4, 16, 40):
                config = LlamaConfig(num_hidden_layers=layers, **WIDTH)
                measure(root, f"{layers} layers", config, ("rand", "stru", "semi"), rows=4)
        if only != "depth":
            measure(root, "llama2-13b", SHAPES["llama2-13b"], ("rand", "stru"), rows=2)


def measure(
    root: Path, shape: str, config: LlamaConfig, methods: tuple[str, ...], rows: int
) -> None:
    """Keep the cells that results.jsonl lacks."""
    cell = {"shape": shape, "scores_in": "bfloat16"}
    missing = [method for method in methods if not kept("memory", **cell, method=method)]
    if missing:
        write(config, root / "model")
    for method in missing:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            # In a new process: memory that was used once is not given back.
            keep("memory", **cell, **fresh.submit(measured, root, method, rows).result())
        shutil.rmtree(root / "pruned")


def write(config: LlamaConfig, out: Path) -> None:
    """A checkpoint of random weights, of which no more than a layer is in memory."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, weight in meta_model(config).state_dict().items():
        pieces = name.split(".")
        part = ".".join(pieces[:3]) if pieces[1] == "layers" else name
        parts.setdefault(part, {})[name] = weight.shape
    for part, shapes in parts.items():
        made = {n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02) for n, s in shapes.items()}
        write_part(out, part, made)
    write_index(out)
    config.save_pretrained(out)


def measured(root: Path, method: str, rows: int) -> dict[str, object]:
    """Seconds and peak of scoring and cutting, or of SparseGPT."""
    peaks, ended = [anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    run(root / "model", root / "pruned", PruneConfig(method, keep_first=1, keep_last=1), rows)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    return {
        "method": method,
        "calibration": f"{rows} x {LENGTH}",
        "seconds": round(seconds, 1),
        "before_mb": round(peaks[0] / 1e6),
        "peak_mb": round(max(peaks) / 1e6),
    }


def run(model: Path, out: Path, config: PruneConfig, rows: int) -> None:
    """Prune as the pipeline does."""
    ids = torch.randint(3, 4096, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).repeat(rows, 1)
    batches: list[Batch] = [{"input_ids": ids, "labels": ids, "position_ids": positions}]
    if config.method == "semi":
        sparsify(model, out, batches, config)
    else:
        scores = score(model, batches, config, dtype=torch.bfloat16)
        prune(model, out, choose(scores, LlamaConfig.from_pretrained(model), config))


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon: a Linux kernel is needed")


if __name__ == "__main__":
    main()
