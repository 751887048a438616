"""Perplexity after pruning, ours beside reference code on the same model, calibration, evaluation.

    python -m tests.benchmarks.pruning [--seeds 0 1 2] [--references DIR]

SmolLM2-135M; 32 x 512 tokens of C4 for calibration, other ones for each seed; 16 x 512 tokens of
held-out C4 (in domain) and of Wikipedia (out of domain) for evaluation; weights in bf16. DIR: see
`references.py`. LLM-Pruner ranks heads and neurons, and as many are kept as by our size rule.

Cells that results.jsonl has are not run again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from loram.data import encode_text, load_tokenizer
from loram.evaluate import perplexity
from loram.loss import Batch
from loram.model import load, read_config
from loram.packing import Packed, batches, cut, write_packed
from loram.prune import PruneConfig, choose, prune, ratio
from loram.sparse import sparsify
from loram.taylor import Scores, taylor_scores
from pipelines.assets import MODEL, home
from tests.benchmarks import keep, kept
from tests.benchmarks.references import layerwise, llm_pruner_scores, sparsegpt, wanda

BASE = home() / "assets" / MODEL
SEQ_LEN, CALIBRATION, ROWS = 512, 32, 48
STRUCTURED = [PruneConfig("stru", share) for share in (0.2, 0.35, 0.5, 0.65)]
SPARSE = [PruneConfig("semi", pattern="2:4"), PruneConfig("semi"), PruneConfig("unst", 0.5)]
SPARSE.append(PruneConfig("unst", 0.55))


def main() -> None:
    """Run the missing cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--references", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for seed in options.seeds:
            for method, code, run in cells(options.references):
                what = method.pattern if method.method == "semi" else f"{ratio(method)}"
                cell = {"method": method.method, "removed": what, "code": code, "seed": seed}
                if kept("pruning", **cell):
                    continue
                rows = text(root, "c4.jsonl", seed)
                began = time.perf_counter()
                model = run(method, list(batches(rows, range(CALIBRATION), 4)), root)
                seconds = time.perf_counter() - began
                found = {
                    domain: perplexity(model, batches(packed, range(CALIBRATION, ROWS), 4))
                    for domain, packed in (
                        ("in", text(root, "c4.jsonl", 99)),
                        ("out", text(root, "wiki.txt", 0)),
                    )
                }
                scores = {f"{k}_perplexity": round(v["perplexity"], 2) for k, v in found.items()}
                keep("pruning", **cell, **scores, seconds=round(seconds, 1))


Run = Callable[[PruneConfig, list[Batch], Path], PreTrainedModel]


def cells(references: Path | None) -> Iterator[tuple[PruneConfig, str, Run]]:
    """What to prune, whose code does it, and how."""
    yield PruneConfig("rand", 0.0), "loram", dense
    for config in STRUCTURED:
        yield config, "loram", ours
        if references:
            yield config, "LLM-Pruner", lambda c, b, r: llm_pruner(c, b, r, references)
    for config in SPARSE:
        yield config, "loram", ours
        if references:
            yield config, "SparseGPT", lambda c, b, r: layerwise(BASE, c, b, sparsegpt(references))
            yield config, "Wanda", lambda c, b, r: layerwise(BASE, c, b, wanda(references))


def text(root: Path, file: str, seed: int) -> Packed:
    """48 packed rows of a file's documents, from a place that the seed says; the last 16 are for
    evaluation, and no calibration of seeds 0 to 3 reads them."""
    where = root / f"{file}-{seed}"
    if not where.exists():
        lines = (home() / "assets" / file).read_text().splitlines()
        if file.endswith(".jsonl"):
            lines = [json.loads(line)["text"] for line in lines]
        tokenizer = load_tokenizer(BASE)
        documents = [encode_text(line, tokenizer) for line in lines if line.strip()]
        skip = len(documents) // 2 if seed == 99 else seed * len(documents) // 8
        rows = [row for row, _ in zip(cut(documents[skip:], SEQ_LEN), range(ROWS), strict=False)]
        write_packed(where, rows, seq_len=SEQ_LEN, pad_id=0)
    return Packed(where)


def dense(config: PruneConfig, rows: list[Batch], root: Path) -> PreTrainedModel:
    """The model as it is."""
    return load(BASE)


def ours(config: PruneConfig, rows: list[Batch], root: Path) -> PreTrainedModel:
    """LoRAM's own pruning."""
    if config.method == "stru":
        return by_scores(config, scores("loram", taylor_scores, rows, root), root)
    with tempfile.TemporaryDirectory(dir=root) as name:
        sparsify(BASE, Path(name) / "pruned", rows, config)
        return load(Path(name) / "pruned")


def llm_pruner(
    config: PruneConfig, rows: list[Batch], root: Path, references: Path
) -> PreTrainedModel:
    """LLM-Pruner's ranking."""
    take = partial(llm_pruner_scores, references=references)
    return by_scores(config, scores("LLM-Pruner", take, rows, root), root)


def by_scores(config: PruneConfig, found: Scores, root: Path) -> PreTrainedModel:
    """The groups with the highest scores, whoever gave these."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        prune(BASE, Path(name) / "pruned", choose(found, read_config(BASE), config))
        return load(Path(name) / "pruned")


def scores(
    code: str, take: Callable[[Path, list[Batch]], Scores], rows: list[Batch], root: Path
) -> Scores:
    """Scores for these rows, taken once and cut at every ratio."""
    kept = root / f"{code}-{int(rows[0]['input_ids'].sum())}"
    if not kept.exists():
        kept.mkdir()
        take(BASE, rows).save(kept)
    return Scores.load(kept)


if __name__ == "__main__":
    main()
