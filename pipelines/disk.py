"""What a run takes on disk, told from its recipe alone, and what a directory has taken."""

import contextlib
import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from loram import plan
from loram.compensate import working_bytes as compensating_bytes
from loram.distil import target_bytes
from loram.offsets import offset_bytes, working_bytes
from pipelines.recipe import Recipe

CHECKPOINTS = 3  # the best, the latest and, while it is written, the next


def taken(directory: Path) -> int:
    """Bytes of the files in a directory, in which another run may be writing; 0 if it is absent."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(parent) / name).lstat().st_size
    return total


def run_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What a run leaves in its store, and takes there meanwhile, at most, but for its rows of data:
    they are a few bytes a token."""
    needed = max(model_bytes(recipe, config), calibration_bytes(recipe, config))
    needed += sft_bytes(recipe, config) + distil_bytes(recipe, config)
    return needed + max(compensate_bytes(recipe, config), offsets_bytes(recipe, config))


def model_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Copies of the model at most: pruned, with stand-ins, aligned, compressed or in NF4; while it
    is aligned, checkpoints of what is trained and of two moments, in float32; QLoRA's."""
    aligned = plan.size(plan.aligned_config(config, recipe.prune, recipe.compensate.rank))
    stored = 4 if config.dtype == torch.float32 else 2  # as pruning and stand-ins keep it
    copies = 2 * stored * aligned.total + 2 * aligned.bf16_bytes
    if recipe.align.steps:
        copies += CHECKPOINTS * 12 * (aligned.total - aligned.frozen_in_alignment)
    return copies + ("qlora" in recipe.compare) * plan.size(config).nf4_bytes


def sft_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Checkpoints of every training of an adapter, counted as on the full model: its weights with
    two moments in float32, and as they are written."""
    trainings = len(recipe.compare) + (recipe.offset.parts if recipe.offset.every else 1)
    return trainings * CHECKPOINTS * 16 * plan.lora_parameters(config, recipe.adapter)


def calibration_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What waits while the model is scored, which is before there are copies: the inputs of all
    layers and the gradients at one's input and output; of SparseGPT the inputs of two."""
    waiting = {"stru": config.num_hidden_layers + 3, "rand": 0}.get(recipe.prune.method, 2)
    positions = recipe.calibration_rows * recipe.align.seq_len
    return 4 * config.hidden_size * positions * waiting


def distil_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What the large model's targets take on disk at most."""
    if not recipe.distil.top:
        return 0
    positions = recipe.align.steps * recipe.align.global_batch * recipe.align.seq_len
    return target_bytes(config, recipe.distil, positions)


def compensate_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What compensation takes on disk at most while it is fitted."""
    given = recipe.compensate
    if not given.rank:
        return 0
    positions = given.rows * max(recipe.align.seq_len, recipe.sft.seq_len)
    return compensating_bytes(config, given.gradients, positions)


def offset_positions(recipe: Recipe) -> int:
    """Of the rows that have offsets: those that SFT reads, at most, and in each part of it those
    that it is evaluated on."""
    return sum(_part_positions(recipe))


def offsets_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What offsets take on disk at most while the last of them are found."""
    every, positions = recipe.offset.every, _part_positions(recipe)
    kept = offset_bytes(config, every, sum(positions))
    return kept + working_bytes(config, every, max(positions))


def _part_positions(recipe: Recipe) -> list[int]:
    sft = recipe.sft
    rows = [sft.global_batch * (end - first) for first, end in recipe.offset.spans(sft.steps)]
    return [sft.seq_len * (each + recipe.instruct.held_out) for each in rows]
