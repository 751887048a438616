"""What the stages of a recipe take of a GPU, told before any is run."""

from dataclasses import replace

from transformers import PreTrainedConfig

from loram import layer_memory, memory, plan
from loram.offsets import corrected
from pipelines.recipe import Recipe


def stages(recipe: Recipe, config: PreTrainedConfig) -> dict[str, int]:
    """Estimated peak bytes a worker, by stage. Evaluation is none of them: what does not fit waits
    in memory there."""
    found: dict[str, int] = {}
    shape = config, recipe.prune, recipe.compensate.rank
    small, place = plan.planned_config(*shape), recipe.place
    rows, seq_len, less = place.micro_batch, recipe.align.seq_len, place.gradient_checkpointing
    if recipe.prune.method != "rand":
        needed = layer_memory.prune_bytes(config, recipe.prune, rows, seq_len)
        found["score, prune (a layer at a time)"] = needed
    if recipe.compensate.rank:
        longest, back = max(seq_len, recipe.sft.seq_len), recipe.compensate.gradients
        needed = layer_memory.compensate_bytes(config, rows, longest, back)
        found["compensate (a layer at a time)"] = needed
    if recipe.distil.top:
        needed = layer_memory.targets_bytes(config, rows, seq_len, recipe.distil.top)
        found["targets (a layer at a time)"] = needed
    if recipe.align.steps:
        found["distil" if recipe.distil.top else "align"] = memory.align_bytes(
            plan.aligned_config(*shape),
            rows,
            seq_len,
            less,
            workers=place.workers,
            masked=plan.size(small).masked,
        )
    plain = replace(recipe.adapter, masked=False)
    batch = rows, recipe.sft.seq_len, less
    if recipe.offset.every:
        trained = recipe.adapter if recipe.offset.parts > 1 else None
        models = config, small, trained, recipe.nf4
        found["offsets"] = layer_memory.offsets_bytes(*models, rows, recipe.sft.seq_len)
    offsets = len(corrected(config, recipe.offset.every))
    found["sft"] = memory.sft_bytes(small, recipe.adapter, recipe.nf4, *batch, offsets)
    for name in recipe.compare:
        found[f"sft_{name}"] = memory.sft_bytes(config, plain, name == "qlora", *batch)
    return found
