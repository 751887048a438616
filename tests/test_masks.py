"""Masks of single weights through alignment, in one process and divided over two."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from loram.loss import CausalLoss
from loram.masks import of_weights
from loram.model import load
from loram.parallel import load_weights, save_state, shard
from loram.train import TrainConfig, adamw, train, train_all_
from tests.sparse_models import UNST, logits, make, rows

CONFIG = TrainConfig(4, 1e-2, 8, warmup_steps=1, weight_decay=0.1)


def aligned(root: Path, masks: bool = True, dtype: torch.dtype = torch.float32):
    """Four steps of training all weights, with or without the masks; and the losses."""
    model = train_all_(load(root / "pruned", dtype=dtype))
    given = of_weights(model, root / "pruned") if masks else None
    return model, [log.loss for log in train(model, rows(3) * 4, CONFIG, masks=given)]


def holes_are_zeros(model, directory: Path) -> bool:
    """Whether exactly the weights that the masks name are zeros."""
    masks = of_weights(model, directory)
    assert len(masks) == 4 * 7
    return all(torch.equal(weight == 0, ~mask) for weight, mask in masks.items())


def test_masks_survive_alignment(tmp_path):
    make("llama", tmp_path, UNST)
    (model, _), before = aligned(tmp_path), load(tmp_path / "pruned", dtype=torch.float32)
    assert holes_are_zeros(model, tmp_path / "pruned")
    assert not torch.equal(logits(model), logits(before))


def test_a_mask_lost_in_alignment_is_noticed(tmp_path):
    make("llama", tmp_path, UNST)
    assert not holes_are_zeros(aligned(tmp_path, masks=False)[0], tmp_path / "pruned")


def test_two_processes_align_as_one_and_keep_the_holes(tmp_path):
    """FSDP2 divides weights and masks by rows; the rest is as of one process, to bf16 rounding."""
    make("qwen2", tmp_path, UNST)
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    alone, losses = aligned(tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(losses, rel=5e-3)
    start = load(tmp_path / "pruned")
    together = load(tmp_path / "pruned", dtype=torch.float32)
    load_weights(tmp_path / "state", together)
    assert holes_are_zeros(together, tmp_path / "pruned")
    moved, apart = 0.0, 0.0
    for before, one, two in zip(
        *(model.parameters() for model in (start, alone, together)), strict=True
    ):
        moved += float((one - before).detach().square().sum())
        apart += float((one - two).detach().square().sum())
    assert apart < 0.05 * moved  # Adam turns rounding of small gradients into whole steps


def one_of_two(rank: int, root: Path) -> None:
    """What each of two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = train_all_(load(root / "pruned"))
    module = shard(CausalLoss(model), torch.device("cpu"))
    optimizer = adamw(module, CONFIG)
    masks = of_weights(model, root / "pruned")
    mine = rows(3)[rank : rank + 1] * 4
    losses = [log.loss for log in train(module, mine, CONFIG, optimizer=optimizer, masks=masks)]
    (root / "losses").write_text(json.dumps(losses))
    save_state(root / "state", module, optimizer, CONFIG.steps)
    dist.destroy_process_group()
