"""A recipe's settings: what can be refused from them and the model's config alone."""

from transformers import PreTrainedConfig

from loram.compensate import DATA
from loram.errors import refuse
from loram.kept import LINEARS
from loram.model import check_full, read_config
from loram.plan import planned_config
from loram.prune import STRUCTURED, PruneConfig
from loram.train import TrainConfig
from pipelines.recipe import Recipe
from pipelines.sample import quotas
from pipelines.sources import SourceSpec

COMPARISONS = ("lora", "qlora", "bound")


def check_settings(recipe: Recipe, config: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """What the recipe and the model's config say, without looking at any other file."""
    config = config or read_config(recipe.model)
    check_full(config, recipe.model)
    _at_least("prune.multiple", recipe.prune.multiple, 1)
    _check_pruning(config, recipe.prune, recipe.adapter.masked)
    _at_least("calibration_rows", recipe.calibration_rows, 1)
    _check_compensation(config, recipe)
    _check_distillation(config, recipe)
    _at_least("offset.every", recipe.offset.every, 0)
    _at_least("offset.parts", recipe.offset.parts, 1)
    if unknown := sorted(set(recipe.compare) - set(COMPARISONS)):
        refuse("compare", repr(unknown[0]), ", ".join(COMPARISONS))
    if "bound" in recipe.compare and recipe.prune.method not in STRUCTURED:
        refuse("compare", f"bound with prune.method {recipe.prune.method}", "rand, stru")
    for name in ("r", "alpha"):
        _at_least(f"adapter.{name}", getattr(recipe.adapter, name), 1)
    linears = [name.rpartition(".")[2] for name in LINEARS]
    for found in recipe.adapter.targets or ("nothing",):
        if found not in linears:
            refuse("adapter.targets", found, ", ".join(linears))
    if not 0 <= recipe.adapter.dropout < 1:
        refuse("adapter.dropout", recipe.adapter.dropout, "a number in [0, 1)")
    _at_least("corpus.rows", recipe.corpus.rows, 1)
    _at_least("corpus.held_out", recipe.corpus.held_out, 1)
    _at_least("instruct.held_out", recipe.instruct.held_out, 1)
    if recipe.instruct.rows is not None:
        _at_least("instruct.rows", recipe.instruct.rows, recipe.instruct.held_out + 1)
    _at_least("evaluate.rows", recipe.evaluate.rows, 1)
    _at_least("evaluate.answers", recipe.evaluate.answers, 0)
    for setting, data in (("corpus", recipe.corpus), ("instruct", recipe.instruct)):
        if not 0 <= data.max_bad_share <= 1:
            refuse(f"{setting}.max_bad_share", data.max_bad_share, "a number in [0, 1]")
        _check_sources(f"{setting}.sources", data.sources, f"{setting}.rows", data.rows)
    for setting in ("in_domain", "out_of_domain"):
        sources = getattr(recipe.evaluate, setting)
        if sources or setting == "out_of_domain":
            name, rows = f"evaluate.{setting}", recipe.evaluate.rows
            _check_sources(name, sources, "evaluate.rows", rows)
    if not recipe.experiment.strip():
        refuse("experiment", "an empty name", "a name")
    for name in ("workers", "micro_batch", "cpus_per_worker"):
        _at_least(f"place.{name}", getattr(recipe.place, name), 1)
    if recipe.place.gpus_per_worker not in (0, 1):
        refuse("place.gpus_per_worker", recipe.place.gpus_per_worker, "0, 1")
    for name, train in (("align", recipe.align), ("sft", recipe.sft)):
        _check_training(name, train, recipe, config)
    _at_least("sft.steps", recipe.sft.steps, 1)
    return config


def _check_sources(
    setting: str, sources: tuple[SourceSpec, ...], divided: str, rows: int | None
) -> None:
    """One at least, and so many rows, the setting `divided`, that each gives some."""
    if not sources:
        refuse(setting, "none", "at least one source")
    for spec in sources:
        if not 0 < spec.weight < float("inf"):
            refuse(f"{setting}: weight", spec.weight, "a number above 0")
        if not 0 < spec.share <= 1:
            refuse(f"{setting}: share", spec.share, "a number above 0, at most 1")
    parts = quotas(rows, [spec.weight for spec in sources], divided)
    for spec, part in zip(sources, parts, strict=True):
        if part == 0:
            found = f"{rows}, by the weights none of {spec.path}"
            refuse(divided, found, "enough for a row of every source")


def _check_pruning(config: PreTrainedConfig, prune: PruneConfig, masked: bool) -> None:
    planned_config(config, prune)
    if masked and prune.method in STRUCTURED:
        refuse("adapter.masked", f"true with prune.method {prune.method}", "semi, unst")


def _check_compensation(config: PreTrainedConfig, recipe: Recipe) -> None:
    compensate = recipe.compensate
    if not 0 <= compensate.rank <= config.hidden_size:
        refuse("compensate.rank", compensate.rank, f"0 (none) to {config.hidden_size}")
    if compensate.data not in DATA:
        refuse("compensate.data", repr(compensate.data), ", ".join(DATA))
    _at_least("compensate.rows", compensate.rows, 2 if compensate.data == "both" else 1)
    if not 1e-6 <= compensate.damping < float("inf"):  # less is not positive definite in rounding
        refuse("compensate.damping", compensate.damping, "1e-6 or more")
    if compensate.rank and compensate.gradients and recipe.offset.every != 1:
        found = f"true with offset.every {recipe.offset.every}"
        refuse("compensate.gradients", found, "true with offset.every 1, or false")


def _check_distillation(config: PreTrainedConfig, recipe: Recipe) -> None:
    distil = recipe.distil
    if not 0 <= distil.top <= config.vocab_size:
        refuse("distil.top", distil.top, f"0 (none) to {config.vocab_size}")
    if not distil.top:
        return
    if not recipe.align.steps:
        refuse("align.steps", "0 with distil.top", "1 or more: it says how long")
    if not 0 <= distil.hidden_layers < config.num_hidden_layers:
        refuse("distil.hidden_layers", distil.hidden_layers, f"0 to {config.num_hidden_layers - 1}")
    if not 0 <= distil.hidden_weight < float("inf"):
        refuse("distil.hidden_weight", distil.hidden_weight, "a number from 0")


def _check_training(
    name: str, train: TrainConfig, recipe: Recipe, config: PreTrainedConfig
) -> None:
    _at_least(f"{name}.steps", train.steps, 0)
    _at_least(f"{name}.warmup_steps", train.warmup_steps, 0)
    _at_least(f"{name}.eval_every", train.eval_every, 1)
    if train.stop is not None and not 1 <= train.stop <= train.steps:
        refuse(f"{name}.stop", train.stop, f"1 to {train.steps}, the steps of {name}")
    if not 0 <= train.weight_decay < float("inf"):
        refuse(f"{name}.weight_decay", train.weight_decay, "a number from 0")
    if not 0 <= train.seed < 2**32:
        refuse(f"{name}.seed", train.seed, "0 to 4294967295")
    for key in ("lr", "clip"):
        if not 0 < getattr(train, key) < float("inf"):
            refuse(f"{name}.{key}", getattr(train, key), "a number above 0")
    if not 2 <= train.seq_len <= config.max_position_embeddings:
        refuse(
            f"{name}.seq_len",
            train.seq_len,
            f"2 to {config.max_position_embeddings}, the context of the model",
        )
    place = recipe.place
    step = place.workers * place.micro_batch
    if train.steps and (train.global_batch < 1 or train.global_batch % step):
        refuse(
            f"{name}.global_batch",
            f"{train.global_batch}, which {place.workers} workers with micro-batches of "
            f"{place.micro_batch} cannot divide",
            f"a multiple of {step}",
        )


def _at_least(setting: str, value: int, least: int) -> None:
    if value < least:
        refuse(setting, value, f"{least} or more")
