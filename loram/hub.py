"""Models of the Hugging Face hub: `owner/name` or `owner/name@revision` (a branch, tag, commit)."""

import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import (
    HfApi,
    ModelInfo,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from loram.errors import refuse

NEEDED = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]
TWICE = "consolidated*"  # the same weights once more, under other names


def split(path: str | Path) -> tuple[str, str]:
    """What loaders take: a directory as it is or the hub id, and the revision, `main` if unsaid."""
    if Path(path).exists():
        return str(path), "main"
    name, _, revision = str(path).partition("@")
    return name, revision or "main"


def local(path: str | Path) -> Path:
    """The directory itself, or the one that a hub id is downloaded to."""
    name, revision = split(path)
    if Path(name).is_dir():
        return Path(name)
    found = snapshot_download(name, revision=revision, allow_patterns=NEEDED, ignore_patterns=TWICE)
    return Path(found)


def missing(path: str) -> dict[str, int] | None:
    """Of each file that `local` gives the bytes that it would download, 0 of one in the cache; None
    with HF_HUB_OFFLINE.

    Raises:
        UserError: as of `commit`.
    """
    about = _about(path)
    if about is None:
        return None
    sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
    chosen = filter_repo_objects(sizes, allow_patterns=NEEDED, ignore_patterns=TWICE)
    name, _ = split(path)
    return {file: 0 if _cached(name, about.sha, file) else sizes[file] for file in chosen}


def commit(path: str) -> str:
    """The commit that a hub id stands for now; with HF_HUB_OFFLINE in the cache.

    Raises:
        UserError: there is none, or the hub is out of reach.
    """
    if about := _about(path):
        return str(about.sha)
    if cached := _cached(*split(path), "config.json"):
        return cached.parent.name
    _refuse(path, "model", OfflineModeIsEnabled())


def config_dict(path: str, setting: str = "model") -> dict[str, Any]:
    """The raw `config.json` of a hub id.

    Raises:
        UserError: there is none, or it is gated or out of reach.
    """
    name, revision = split(path)
    if not _cached(name, revision, "config.json"):
        _about(path, setting)  # a download of what is out of reach would retry for half a minute
    try:
        return json.loads(Path(hf_hub_download(name, "config.json", revision=revision)).read_text())
    except RemoteEntryNotFoundError:
        refuse(setting, f"{path} without config.json", "a model")
    except ValueError as error:
        refuse(setting, f"{path}, config.json that is not JSON ({error})", "a model's config.json")
    except Exception as error:
        _refuse(path, setting, error)


def _about(path: str, setting: str = "model") -> ModelInfo | None:
    name, revision = split(path)
    try:
        return HfApi().model_info(name, revision=revision, files_metadata=True, timeout=5)
    except OfflineModeIsEnabled:
        return None
    except Exception as error:
        _refuse(path, setting, error)


def _refuse(path: str, setting: str, error: Exception) -> NoReturn:
    """For what the hub's client raised, often what its HTTP library of the day raises."""
    name, revision = split(path)
    if isinstance(error, GatedRepoError):
        refuse(setting, f"{name}, which is gated", "a model that HF_TOKEN gives access to")
    if isinstance(error, RevisionNotFoundError):
        refuse(setting, f"{name} without revision {revision!r}", "a branch, tag or commit of it")
    if HF_HUB_OFFLINE:
        refuse(setting, f"{path}, which the cache has not (HF_HUB_OFFLINE)", "one that it has")
    refuse(setting, f"{path}, neither a directory nor a hub id within reach", "a model")


def _cached(name: str, revision: str | None, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # a directory that is not there
        return None
    return Path(found) if isinstance(found, str) else None  # it can also be known to have none
