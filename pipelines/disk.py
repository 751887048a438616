"""What of a run's results on disk can be told from its recipe alone, beside copies of the model."""

from transformers import PreTrainedConfig

from loram.distil import target_bytes
from loram.offsets import offset_bytes, working_bytes
from pipelines.recipe import Recipe


def distil_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What the large model's targets take on disk at most."""
    if not recipe.distil.trained:
        return 0
    positions = recipe.align.steps * recipe.align.global_batch * recipe.align.seq_len
    return target_bytes(config, recipe.distil, positions)


def offset_positions(recipe: Recipe) -> int:
    """Of the rows that have offsets: those that SFT reads, at most, and is evaluated on."""
    rows = recipe.sft.steps * recipe.sft.global_batch + recipe.instruct.held_out
    return rows * recipe.sft.seq_len


def offsets_bytes(recipe: Recipe, config: PreTrainedConfig) -> int:
    """What offsets take on disk at most while they are found."""
    positions = offset_positions(recipe)
    kept = offset_bytes(config, recipe.offset, positions)
    return kept + working_bytes(config, recipe.offset, positions)
