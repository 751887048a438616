"""What a run's results take on disk, told from its recipe."""

import pytest
import torch

import loram.compensate
from loram.model import read_config
from loram.offsets import offset_bytes, working_bytes
from loram.plan import aligned_config, lora_parameters, size
from loram.pruned import meta_model
from loram.train import train_all_
from pipelines.disk import (
    calibration_bytes,
    compensate_bytes,
    model_bytes,
    offset_positions,
    offsets_bytes,
    run_bytes,
    sft_bytes,
)
from pipelines.recipes import resolve


def test_each_part_has_offsets_of_its_rows_and_of_the_held_out_ones():
    words = ["offset.every=2", "offset.parts=3", "sft.steps=7", "instruct.held_out=5"]
    recipe = resolve("test", words)
    config, batch, length = read_config(recipe.model), recipe.sft.global_batch, recipe.sft.seq_len
    positions = [(steps * batch + 5) * length for steps in (2, 3, 2)]
    assert offset_positions(recipe) == sum(positions)
    kept = offset_bytes(config, 2, sum(positions))
    assert offsets_bytes(recipe, config) == kept + working_bytes(config, 2, positions[1])
    assert offsets_bytes(resolve("test", [*words, "offset.every=0"]), config) == 0


@pytest.mark.parametrize("method", ["stru", "semi"])
def test_checkpoints_of_all_that_is_aligned(method):
    """With two moments in float32; of single weights of the whole model."""
    words = [f"prune.method={method}", "compensate.rank=4"]
    config = read_config(resolve("test", words).model)
    with_steps, without = (
        model_bytes(resolve("test", [*words, f"align.steps={steps}"]), config) for steps in (4, 0)
    )
    small = meta_model(aligned_config(config, resolve("test", words).prune, 4))
    trained = [w for w in train_all_(small).parameters() if w.requires_grad]
    assert with_steps - without == 3 * 12 * sum(w.numel() for w in trained)
    assert without == 4 * 2 * sum(w.numel() for w in small.parameters())
    config.dtype = torch.float32
    kept = model_bytes(resolve("test", [*words, "align.steps=0"]), config)
    assert kept == (2 * 4 + 2 * 2) * sum(w.numel() for w in small.parameters())
    config.dtype = torch.bfloat16
    qlora = resolve("test", [*words, "align.steps=0", 'compare=["lora", "qlora"]'])
    assert model_bytes(qlora, config) - without == size(config).nf4_bytes


def test_what_waits_while_the_model_is_scored_counts_where_it_is_more():
    words = ["align.seq_len=512", "calibration_rows=100000", "align.steps=0"]
    recipe = resolve("test", words)
    config = read_config(recipe.model)
    assert calibration_bytes(recipe, config) == 100_000 * 512 * 4 * 64 * 7
    beside = sft_bytes(recipe, config)
    assert beside == 2 * 3 * 16 * lora_parameters(config, recipe.adapter)
    assert run_bytes(recipe, config) == calibration_bytes(recipe, config) + beside
    assert calibration_bytes(resolve("test", [*words, "prune.method=rand"]), config) == 0


def test_compensation_over_the_longest_rows():
    words = ["compensate.rank=4", "compensate.rows=5", "sft.seq_len=128", "align.seq_len=64"]
    recipe = resolve("test", words)
    config = read_config(recipe.model)
    assert compensate_bytes(recipe, config) == loram.compensate.working_bytes(
        config, False, 5 * 128
    )
    assert compensate_bytes(resolve("test", ["compensate.rank=0"]), config) == 0
