"""Everything that can be refused before compute starts: settings, files, space, servers."""

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from loram.data import encode_chat, load_tokenizer
from loram.errors import refuse
from loram.formats import Message
from loram.hub import local, missing
from loram.model import INDEX, WEIGHTS, check_weights
from loram.plan import size
from pipelines import disk, tracking
from pipelines.assets import home
from pipelines.lock import try_lock
from pipelines.recipe import Corpus, Instruct, Recipe
from pipelines.settings import check_settings
from pipelines.sources import peek


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
            if isinstance(found[0], list):  # conversations, which a corpus may hold too
                length = recipe.sft.seq_len if kind is Instruct else None
                check_trainable(found, setting, tokenizer, length)
    check_hardware(recipe)
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
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    needed, free = sum(files.values()), shutil.disk_usage(disk).free
    if free < needed and not os.environ.get("RAY_ADDRESS"):  # the nodes of a cluster have caches
        refuse("HF_HOME", f"{free / 1e9:.1f} GB free at {cache}", f"{needed / 1e9:.1f} GB or more")


def check_trainable(
    conversations: list[list[Message]],
    setting: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int | None,
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


def check_store(store: Path, config: PreTrainedConfig, known: int = 0) -> None:
    """The store can be written and holds what a run of this model leaves there.

    Args:
        known: bytes of what the large model makes of rows: targets, offsets.
    """
    check_directory("store", store)
    # Pruned, aligned and quantised copies, and checkpoints of alignment in float32 with moments.
    needed, free = 15 * size(config).total + known, shutil.disk_usage(store).free
    if free < needed:
        refuse("store", f"{free / 1e9:.1f} GB free at {store}", f"{needed / 1e9:.1f} GB or more")
