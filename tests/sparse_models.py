"""Small models pruned by SparseGPT, and what they are calibrated on."""

from pathlib import Path

import torch

from loram.model import save
from loram.prune import PruneConfig
from loram.sparse import sparsify
from tests.conftest import tiny_model

SEMI, UNST = PruneConfig("semi"), PruneConfig("unst")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def rows(seed: int, count: int = 8, length: int = 48) -> list[dict[str, torch.Tensor]]:
    """Calibration in two batches; each row is two documents that must not see one another."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length // 2).repeat(2)[None].repeat(count, 1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    batch["row"] = torch.arange(count)
    half = count // 2
    return [{k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def make(family: str, root: Path, config: PruneConfig = SEMI) -> dict[str, float]:
    """`base` and `pruned` in `root`."""
    save(tiny_model(family), root / "base")
    return sparsify(root / "base", root / "pruned", rows(2), config)
