"""What folding the scores of query heads costs on a model with 8 KV heads x 4 query heads.

    python -m tests.benchmarks.gqa --references DIR [--steps N]

No model of that kind is at hand, so a small byte-level llama is trained on C4 and Wikipedia. Then
its inner layers lose 1/4, 1/2 and 3/4 of their KV groups, and no neuron: by our scores, by those of
LLM-Pruner's own code, which folds query heads {g, g + K, g + 2K, ...} onto KV head g, and at
random. Perplexity a byte on held-out C4. DIR: see `references.py`.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loram.data import Document
from loram.evaluate import perplexity
from loram.model import load, save
from loram.packing import Packed, batches, cut, order, write_packed
from loram.prune import PruneConfig, choose, prune
from loram.taylor import Scores, random_scores, taylor_scores
from loram.train import TrainConfig, train
from pipelines.assets import home
from tests.benchmarks import keep
from tests.benchmarks.references import llm_pruner_scores

SEQ_LEN, HELD_OUT, CALIBRATION = 256, 64, 64
SHAPE = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=SEQ_LEN,
)


def main() -> None:
    """Train, score, cut, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = text(root)
        trained = order(rows.rows - HELD_OUT, 8 * options.steps, seed=0)
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPE)
        config = TrainConfig(options.steps, 2e-3, 8, SEQ_LEN, weight_decay=0.1)
        list(train(model, batches(rows, trained, 8), config))
        save(model.bfloat16(), root / "model")
        held_out = range(rows.rows - HELD_OUT, rows.rows)

        def found(directory: Path) -> float:
            return round(perplexity(load(directory), batches(rows, held_out, 16))["perplexity"], 4)

        cell = {"steps": options.steps, "kv_heads": 8, "query_heads": 32}
        keep("gqa", **cell, scores="none, the whole model", perplexity=found(root / "model"))
        folded = partial(llm_pruner_scores, references=options.references)
        takes = {"true groups": taylor_scores, "folded, LLM-Pruner": folded}
        takes["random"] = lambda *_: random_scores(SHAPE, 0)
        calibration = list(batches(rows, range(CALIBRATION), 16))
        scores = {kind: take(root / "model", calibration) for kind, take in takes.items()}
        for ratio in (0.25, 0.5, 0.75):
            for kind, of in scores.items():
                out = root / f"{ratio}-{kind}"
                prune(root / "model", out, heads_alone(of, ratio))
                keep("gqa", **cell, scores=kind, ratio=ratio, perplexity=found(out))


def heads_alone(scores: Scores, ratio: float):  # noqa: ANN201
    """What stays if the first and the last layer, and all neurons, do."""
    config = PruneConfig("stru", ratio, keep_first=1, keep_last=1)
    whole = choose(scores, SHAPE, PruneConfig("stru", 0.0, keep_first=1, keep_last=1))
    return type(whole)(choose(scores, SHAPE, config).kv_heads, whole.neurons)


def text(root: Path) -> Packed:
    """Bytes of Wikipedia, then of C4, of which the last rows are held out."""

    def documents() -> Iterator[Document]:
        c4 = (home() / "assets" / "c4.jsonl").read_text().splitlines()
        texts = (home() / "assets" / "wiki.txt").read_text().splitlines()
        for line in [*texts, *(json.loads(line)["text"] for line in c4)]:
            ids = np.frombuffer(line.encode(), dtype=np.uint8).astype(np.int32)
            if len(ids):
                yield Document(ids, np.ones(len(ids), dtype=bool))

    write_packed(root / "rows", cut(documents(), SEQ_LEN), seq_len=SEQ_LEN, pad_id=0)
    return Packed(root / "rows")


if __name__ == "__main__":
    main()
