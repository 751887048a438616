"""Everything that can be refused before compute starts: settings, files, space, servers."""

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loram.compensate import DATA
from loram.data import encode_chat, load_tokenizer
from loram.errors import refuse
from loram.formats import Message
from loram.model import check_weights, read_config
from loram.plan import planned_config, size
from loram.prune import STRUCTURED, PruneConfig
from loram.train import TrainConfig
from pipelines import disk, tracking
from pipelines.assets import home
from pipelines.recipe import Corpus, Instruct, Recipe
from pipelines.sources import peek

COMPARISONS = ("lora", "qlora", "bound")


def check(recipe: Recipe, store: Path) -> PreTrainedConfig:
    """Refuse a recipe that could not run to its end; takes seconds and reads no weights.

    Returns: the config of the full model.

    Raises:
        UserError: names the setting, what was found and what is accepted.
    """
    config = check_settings(recipe)
    known = disk.distil_bytes(recipe, config)
    known += max(disk.compensate_bytes(recipe, config), disk.offsets_bytes(recipe, config))
    check_store(store, config, known)
    tokenizer = check_model(recipe.model)
    for setting, sources, kind in (
        ("corpus.sources", recipe.corpus.sources, Corpus),
        ("instruct.sources", recipe.instruct.sources, Instruct),
        ("evaluate.in_domain", recipe.evaluate.in_domain, Instruct),
        ("evaluate.out_of_domain", recipe.evaluate.out_of_domain, Instruct),
    ):
        for spec in sources:
            found = peek(spec, setting, chat=kind is Instruct)
            if kind is Instruct:
                check_trainable(found, setting, tokenizer, recipe.sft.seq_len)
    check_hardware(recipe)
    tracking.check(recipe.tracking or tracking.local(home() / "mlflow"))
    return config


def check_settings(recipe: Recipe, config: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """What the recipe and the model's config say, without looking at any other file."""
    config = config or read_config(recipe.model)
    if config.model_type.startswith("loram_"):
        refuse("model", f"{recipe.model}, a pruned model", "the full model that it was cut from")
    _check_pruning(config, recipe.prune, recipe.adapter.masked)
    _at_least("prune.multiple", recipe.prune.multiple, 1)
    _at_least("calibration_rows", recipe.calibration_rows, 1)
    _check_compensation(config, recipe)
    _check_distillation(config, recipe)
    _at_least("offset.every", recipe.offset.every, 0)
    _at_least("offset.parts", recipe.offset.parts, 1)
    whole = recipe.prune.keep_first + recipe.prune.keep_last
    if recipe.prune.method in STRUCTURED and (
        min(recipe.prune.keep_first, recipe.prune.keep_last) < 0
        or whole >= config.num_hidden_layers
    ):
        refuse(
            "prune.keep_first + prune.keep_last",
            f"{recipe.prune.keep_first} + {recipe.prune.keep_last}",
            f"two numbers from 0 with a sum under the model's {config.num_hidden_layers} layers",
        )
    if unknown := sorted(set(recipe.compare) - set(COMPARISONS)):
        refuse("compare", repr(unknown[0]), ", ".join(COMPARISONS))
    if "bound" in recipe.compare and recipe.prune.method not in STRUCTURED:
        refuse("compare", f"bound with prune.method {recipe.prune.method}", "rand, stru")
    for name in ("r", "alpha"):
        _at_least(f"adapter.{name}", getattr(recipe.adapter, name), 1)
    if not 0 <= recipe.adapter.dropout < 1:
        refuse("adapter.dropout", recipe.adapter.dropout, "a number in [0, 1)")
    _at_least("corpus.rows", recipe.corpus.rows, 1)
    _at_least("corpus.held_out", recipe.corpus.held_out, 1)
    _at_least("instruct.held_out", recipe.instruct.held_out, 1)
    _at_least("evaluate.rows", recipe.evaluate.rows, 1)
    _at_least("evaluate.answers", recipe.evaluate.answers, 0)
    for name, sources in (
        ("corpus.sources", recipe.corpus.sources),
        ("instruct.sources", recipe.instruct.sources),
        ("evaluate.out_of_domain", recipe.evaluate.out_of_domain),
    ):
        if not sources:
            refuse(name, "none", "at least one source")
    for name, train in (("align", recipe.align), ("sft", recipe.sft)):
        _check_training(name, train, recipe, config)
    _at_least("sft.steps", recipe.sft.steps, 1)
    return config


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
    _at_least("place.workers", place.workers, 1)
    _at_least("place.micro_batch", place.micro_batch, 1)
    _at_least("place.cpus_per_worker", place.cpus_per_worker, 1)
    step = place.workers * place.micro_batch
    if train.global_batch < 1 or train.global_batch % step:
        refuse(
            f"{name}.global_batch",
            f"{train.global_batch}, which {place.workers} workers with micro-batches of "
            f"{place.micro_batch} cannot divide",
            f"a multiple of {step}",
        )


def check_model(model: str) -> PreTrainedTokenizerBase:
    """The model's weights and tokenizer are there, whole, and openable (local models).

    Returns: the tokenizer.
    """
    if Path(model).is_dir():
        check_weights(Path(model))
    try:
        return load_tokenizer(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        refuse("model", f"{model} without a tokenizer that opens ({reason})", "one with tokenizer")


def check_trainable(
    conversations: list[list[Message]],
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> None:
    """Refuse instructions of which `peek` found none with a trainable token."""
    reason = ""
    for messages in conversations:
        try:
            encode_chat(messages, tokenizer, seq_len)
            return
        except ValueError as error:
            reason = str(error)
    found = f"no trainable token in the first {len(conversations)} rows ({reason})"
    refuse(setting, found, "answers that begin within seq_len tokens and suit the chat template")


def check_hardware(recipe: Recipe) -> None:
    """Enough GPUs and CPUs; a running cluster may still grow and is not asked here."""
    if os.environ.get("RAY_ADDRESS"):
        return
    place, gpus, cpus = recipe.place, torch.cuda.device_count(), os.cpu_count() or 1
    asked = place.workers * place.gpus_per_worker
    if asked > gpus:
        refuse("place.workers x place.gpus_per_worker", f"{asked} GPUs", f"at most {gpus} here")
    asked = place.workers * place.cpus_per_worker
    if asked > cpus:
        refuse("place.workers x place.cpus_per_worker", f"{asked} CPUs", f"1 to {cpus} here")
    if place.gpus_per_worker and torch.cuda.get_device_capability() < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        refuse("GPU", f"compute capability {found}", "8.0 or newer, for bfloat16")


def check_store(store: Path, config: PreTrainedConfig, known: int = 0) -> None:
    """The store can be written and holds what a run of this model leaves there.

    Args:
        known: bytes of what the large model makes of rows: targets, offsets.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        probe = store / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        refuse("store", f"{store}, not writable ({error.strerror})", "a writable directory")
    # Pruned, aligned and quantised copies, and checkpoints of alignment in float32 with moments.
    needed, free = 15 * size(config).total + known, shutil.disk_usage(store).free
    if free < needed:
        refuse("store", f"{free / 1e9:.1f} GB free at {store}", f"{needed / 1e9:.1f} GB or more")


def _at_least(setting: str, value: int, least: int) -> None:
    if value < least:
        refuse(setting, value, f"{least} or more")
