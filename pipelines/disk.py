"""What of a run's results on disk can be told from its recipe alone, beside copies of the model."""

from transformers import PreTrainedConfig

from loram.distil import target_bytes
from loram.offsets import offset_bytes, working_bytes
from pipelines.recipe import Recipe


def distil_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What the large model's targets take on disk at most."""
    if not recipe.distil.top:
        return 0
    positions = recipe.align.steps * recipe.align.global_batch * recipe.align.seq_len
    return target_bytes(config, recipe.distil, positions)


def offset_positions(recipe: Recipe) -> int:
    """Of the rows that have offsets: those that SFT reads, at most, and in each part of it those
    that it is evaluated on."""
    rows = recipe.sft.steps * recipe.sft.global_batch
    parts = len(recipe.offset.spans(recipe.sft.steps))
    return (rows + parts * recipe.instruct.held_out) * recipe.sft.seq_len


def offsets_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What offsets take on disk at most while the last of them are found."""
    layers = recipe.offset.layers
    longest = max(end - first for first, end in recipe.offset.spans(recipe.sft.steps))
    rows = longest * recipe.sft.global_batch + recipe.instruct.held_out
    working = working_bytes(config, layers, rows * recipe.sft.seq_len)
    return offset_bytes(config, layers, offset_positions(recipe)) + working
