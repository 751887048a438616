"""Time of pruning one layer by our SparseGPT and by the reference, side by side.

    python -m tests.benchmarks.layer_time --references DIR

The first layer of SmolLM2-135M, 8 x 512 tokens of C4: inputs of all linears, pruning, outputs. The
two take turns within every round; medians. DIR: see `references.py`. Ours also reads the layer and
its inputs from disk and writes the layer, its masks and its outputs.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from loram.layers import Layers, Spool
from loram.packing import batches
from loram.prune import PruneConfig, pattern
from loram.sparse import sparsify_layer
from tests.benchmarks import keep
from tests.benchmarks.pruning import BASE, text
from tests.benchmarks.references import prune_layer, sparsegpt

ROWS, ROUNDS = 8, 5


@torch.no_grad()
def main() -> None:
    """A line for each of 4:8 and 0.55."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=Path, required=True)
    decide = sparsegpt(parser.parse_args().references)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = list(batches(text(root, "c4.jsonl", 0), range(ROWS), 4))
        layers, spool = Layers(BASE), Spool(root / "activations")
        hidden = list(layers.embedded(rows))
        spool.write("input-0", hidden)
        for config in (PruneConfig("semi"), PruneConfig("unst")):
            times: dict[str, list[float]] = {"ours": [], "reference": []}
            for _ in range(ROUNDS):
                began = time.perf_counter()
                sparsify_layer(layers, 0, rows, spool, pattern(config), root)
                turned = time.perf_counter()
                prune_layer(layers, 0, layers.layer(0), hidden, rows, config, decide)
                times["ours"].append(turned - began)
                times["reference"].append(time.perf_counter() - turned)
            ours, reference = (statistics.median(found) for found in times.values())
            keep(
                "layer_time",
                method=config.method,
                tokens=512 * ROWS,
                ours_s=round(ours, 2),
                reference_s=round(reference, 2),
                ratio=round(ours / reference, 2),
            )


if __name__ == "__main__":
    main()
