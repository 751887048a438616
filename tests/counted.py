"""Models whose estimated memory is compared with what torch's profiler sees."""

import gc
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from loram.compensate import CompensateConfig, compensate
from loram.model import read_config, save
from loram.prune import PruneConfig, choose, prune
from loram.sparse import compress, sparsify
from loram.taylor import random_scores
from tests.conftest import tiny_model

SEMI, T = PruneConfig("semi"), 128
CUT = PruneConfig("stru", 0.5, keep_first=1, keep_last=1)
# A deep one with a large vocabulary and biases, a wide one whose head is tied to its embeddings.
MODELS = {
    "qwen2": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5}
    | {"vocab_size": 4096, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    | {"vocab_size": 2048, "tie_word_embeddings": True},
}


def make_models(root: Path) -> Path:
    """Each family full, cut in its inner layers, with stand-ins, by SparseGPT, compressed."""
    for family, shape in MODELS.items():
        where = root / family
        save(tiny_model(family, max_position_embeddings=512, **shape).bfloat16(), where / "full")
        config = read_config(where / "full")
        cut = where / "full", where / "stru"
        prune(*cut, choose(random_scores(config, 0), config, CUT))
        fitted = CompensateConfig(rank=16)
        compensate(*cut, where / "stand_ins", [batch(2, 2048)], fitted)
        sparsify(where / "full", where / "semi", [batch(2, 2048)], SEMI)
        compress(where / "semi", where / "compressed", nf4=False)
        compress(where / "semi", where / "compressed_nf4", nf4=True)
    return root


def batch(rows: int, vocab: int) -> dict[str, torch.Tensor]:
    """Rows of two documents each."""
    ids = torch.randint(3, vocab, (rows, T), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(T // 2).repeat(rows, 2)
    row = torch.arange(rows)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "row": row}


def seen(run) -> int:
    """The largest sum of bytes that were allocated and not yet freed."""
    gc.collect()  # or what it frees half-way counts as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top
