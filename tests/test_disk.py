"""What a run's results take on disk, told from its recipe."""

from loram.model import read_config
from loram.offsets import offset_bytes, working_bytes
from pipelines.disk import known_bytes
from pipelines.recipes import resolve


def test_trainings_of_one_small_model_share_the_offsets_of_the_first_part():
    words = ["offset.layers=2", "offset.parts=3", "sft.steps=7", "instruct.held_out=5"]
    recipe = resolve("test", words)
    config, batch, length = read_config(recipe.model), recipe.sft.global_batch, recipe.sft.seq_len
    first, *later = ((steps * batch + 5) * length for steps in (2, 3, 2))
    one, two, ten = (known_bytes(recipe, config, n) for n in (1, 2, 10))
    most = working_bytes(config, 2, max(later))
    assert one == offset_bytes(config, 2, first + sum(later)) + most
    assert two - one == offset_bytes(config, 2, sum(later)) == (ten - one) / 9
    assert known_bytes(resolve("test", [*words, "offset.layers=0"]), config, 10) == 0
