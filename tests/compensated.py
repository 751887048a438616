"""Small models with stand-ins for what was removed, and what these are fitted on."""

from pathlib import Path

import torch

from loram.compensate import CompensateConfig, compensate
from loram.model import load, save
from loram.prune import PruneConfig, choose, prune
from loram.sparse import sparsify
from loram.taylor import random_scores
from tests.conftest import FAMILIES, tiny_model

CUT = PruneConfig("rand", 0.5, keep_first=1, keep_last=1, seed=3)
# Stand-ins on gradients, of models of four layers.
EVERY = {"gradients": True, "offsets": range(1, 5)}
# Structured pruning on every family, single weights on two.
PRUNINGS = [*((family, "rand") for family in FAMILIES), ("llama", "semi"), ("qwen3", "unst")]


def rows(seed: int, count: int = 8, length: int = 48, document: int = 12) -> list[dict]:
    """Random ids in two batches; documents of `document` tokens that do not see one another."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(document).repeat(length // document)[None].repeat(count, 1)
    whole = {"input_ids": ids, "labels": ids, "position_ids": positions, "row": torch.arange(count)}
    half = count // 2
    return [{k: v[:half] for k, v in whole.items()}, {k: v[half:] for k, v in whole.items()}]


def logits(model, document: int = 12) -> torch.Tensor:
    """On tokens that nothing was fitted on."""
    batch = rows(99, document=document)[0]
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        return model(**given, use_cache=False).logits.float()


def make(root: Path, family: str, method: str = "rand", rank: int = 4, model=None, **options):
    """root/base, its pruned copy root/pruned and the compensated one root/small."""
    full = model or tiny_model(family)
    save(full, root / "base")
    if method == "rand":
        kept = choose(random_scores(full.config, 3), full.config, CUT)
        prune(root / "base", root / "pruned", kept)
    else:
        sparsify(root / "base", root / "pruned", rows(2), PruneConfig(method))
    return again(root, rank, **options)


def again(
    root: Path, rank: int, out="small", batches=None, damping=1e-2, gradients=False, **options
):
    config = CompensateConfig(rank=rank, damping=damping, gradients=gradients)
    batches = batches or rows(2, 64)
    return compensate(root / "base", root / "pruned", root / out, batches, config, **options)


def distance(root: Path, small: Path, document: int = 12) -> float:
    """Mean squared difference of the logits to those of the full model."""
    full, other = (load(path, dtype=torch.float32) for path in (root / "base", small))
    return float((logits(full, document) - logits(other, document)).square().mean())
