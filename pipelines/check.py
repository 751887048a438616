"""Everything that can be refused before compute starts: settings, files, space, servers."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loram.data import encode_chat, load_tokenizer
from loram.errors import refuse
from loram.formats import Message
from loram.hub import local, missing
from loram.model import INDEX, WEIGHTS, check_weights
from pipelines import disk, tracking
from pipelines.assets import home
from pipelines.gpu_memory import stages
from pipelines.lock import try_lock
from pipelines.recipe import Instruct, Recipe
from pipelines.sample import Config
from pipelines.settings import check_settings
from pipelines.sources import peek
from pipelines.step import Step, topological_order
from pipelines.store import Store

MARGIN = 1.15  # estimates have been up to 12 % above what was measured


def check(recipe: Recipe, store: Path) -> PreTrainedConfig:
    """Refuse a recipe that could not run to its end; takes seconds and reads no weights. Whether
    the disk has room is told once its steps are known, by `check_space`.

    Returns: the config of the full model.

    Raises:
        UserError: names the setting, what was found and what is accepted.
    """
    config = check_settings(recipe)
    check_directory("store", store)
    tokenizer = check_model(recipe.model)
    for setting, sources, data in (
        ("corpus.sources", recipe.corpus.sources, recipe.corpus),
        ("instruct.sources", recipe.instruct.sources, recipe.instruct),
        ("evaluate.in_domain", recipe.evaluate.in_domain, recipe.instruct),
        ("evaluate.out_of_domain", recipe.evaluate.out_of_domain, recipe.instruct),
    ):
        for spec in sources:
            chat = isinstance(data, Instruct)
            found = peek(spec, setting, chat=chat)
            if isinstance(found[0], list):  # conversations, which a corpus may hold too
                limits = recipe.sft.seq_len if chat else None, config.vocab_size
                check_trainable(found, setting, tokenizer, *limits, data.max_bad_share)
    check_hardware(recipe, config)
    check_directory("LORAM_HOME", home() / "mlflow")
    tracking.check(recipe.tracking or tracking.local(home() / "mlflow"))
    return config


def check_model(model: str) -> PreTrainedTokenizerBase:
    """The model's weights and tokenizer are there, whole, and openable; of the hub's, before they
    are downloaded, that they are there and have room.

    Returns: the tokenizer.
    """
    if Path(model).is_dir():
        check_weights(Path(model))
    else:
        check_download(model)
    try:
        return load_tokenizer(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        refuse("model", f"{model} without a tokenizer that opens ({reason})", "one with tokenizer")


def check_download(model: str) -> None:
    """The weights of a hub id are in its cache, or on the hub and the cache has room for them."""
    files = missing(model)
    if files is None or not any(files.values()):
        return check_weights(local(model))
    if not files.keys() & {INDEX, WEIGHTS}:
        refuse("model", f"{model} without {WEIGHTS}", "a model with safetensors weights")
    cache = Path(HF_HUB_CACHE)
    there = next(path for path in (cache, *cache.parents) if path.exists())
    needed, free = sum(files.values()), shutil.disk_usage(there).free
    if free < needed and not os.environ.get("RAY_ADDRESS"):  # the nodes of a cluster have caches
        refuse("HF_HOME", f"{free / 1e9:.1f} GB free at {cache}", f"{needed / 1e9:.1f} GB or more")


def check_trainable(
    conversations: list[list[Message]],
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int | None,
    vocab_size: int,
    max_bad_share: float,
) -> None:
    """Refuse instructions of which, by those that `peek` found, far too many give no trained token,
    and a tokenizer with tokens of which the model has no embedding."""
    reasons = []
    for messages in conversations:
        try:
            largest = encode_chat(messages, tokenizer, seq_len).ids.max()
        except ValueError as error:
            reasons.append(str(error))
            continue
        if largest >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(int(largest))
            found = f"a tokenizer with {token!r}, id {largest}, and {vocab_size} embeddings"
            refuse("model", found, "embeddings of all tokens that its chat template writes")
    # The first rows may by chance be worse than all.
    if len(reasons) > min(2 * max_bad_share * len(conversations), len(conversations) - 1):
        found = f"{len(reasons)} of the first {len(conversations)} rows without a trained token"
        accepted = "answers that begin within seq_len tokens and suit the chat template in all but"
        refuse(
            setting, f"{found} ({reasons[0]})", f"{accepted} {max_bad_share:.1%} (max_bad_share)"
        )


def check_hardware(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Enough GPUs and CPUs, and on a GPU enough memory for every stage, as estimated; a running
    cluster may still grow and is not asked here."""
    if address := os.environ.get("RAY_ADDRESS"):
        if "://" in address:  # to this one jobs are submitted
            refuse("RAY_ADDRESS", address, "HOST:PORT of a cluster's head, or auto")
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
    if place.gpus_per_worker:
        check_gpu_memory(recipe, config, torch.cuda.get_device_properties(0).total_memory)


def check_gpu_memory(recipe: Recipe, config: PreTrainedConfig, memory: int) -> None:
    """A GPU with so many bytes holds every stage, as estimated."""
    stage, most = max(stages(recipe, config).items(), key=lambda item: item[1])
    if most > MARGIN * memory:
        found = f"{stage}, which takes some {most / 1e9:.1f} GB a worker"
        helps = "more place.workers, " * (stage in ("align", "distil"))
        helps += "place.gradient_checkpointing or a smaller place.micro_batch may help"
        refuse("GPU memory", found, f"{memory / 1e9:.1f} GB; {helps}")


def check_directory(setting: str, directory: Path) -> None:
    """It can be written, and files in it locked."""
    probe = directory / f".probe-{os.getpid()}"
    try:
        if lock := try_lock(probe):
            lock.release()
        probe.unlink()
    except OSError as error:
        found = f"{directory}, not writable or without locks ({error.strerror})"
        refuse(setting, found, "a writable directory, on a file system with flock")


def check_space(
    store: Store, recipe: Recipe, config: PreTrainedConfig, targets: Iterable[Step]
) -> None:
    """The store has room for what a run takes there, less what its steps have taken already."""
    needed, free = disk.run_bytes(recipe, config), shutil.disk_usage(store.root).free
    for step in topological_order(targets):
        if not isinstance(step.config, Config):  # rows of data are not in `run_bytes`
            needed -= disk.taken(store.entry(step.slug)) + disk.taken(store.work(step.slug))
    if free < needed:
        found = f"{free / 1e9:.1f} GB free at {store.root}"
        refuse("store", found, f"{needed / 1e9:.1f} GB or more")
