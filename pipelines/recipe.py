"""A recipe is a whole run, in plain frozen dataclasses; `recipes.py` has those with a name."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from loram.adapter import AdapterConfig
from loram.compensate import CompensateConfig
from loram.distil import DistilConfig
from loram.errors import refuse
from loram.offsets import OffsetConfig
from loram.prune import PruneConfig
from loram.train import TrainConfig
from pipelines.journal import redact
from pipelines.place import Place
from pipelines.sources import SourceSpec


@dataclass(frozen=True)
class Corpus:
    """General text, or conversations, for alignment and calibration.

    rows: documents chosen at random over all sources, by weight. held_out: packed rows kept from
    training for evaluation at intervals. max_bad_share: malformed rows tolerated.
    """

    sources: tuple[SourceSpec, ...]
    rows: int = 102_400
    held_out: int = 256
    max_bad_share: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Instruct:
    """Instructions for SFT. rows: None for all; held_out: conversations kept from training."""

    sources: tuple[SourceSpec, ...]
    rows: int | None = None
    held_out: int = 256
    max_bad_share: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Evaluate:
    """Held-out instructions: in_domain empty means the held-out part of the training source.

    answers: how many in-domain problems each model answers, for the score; 0 for none.
    """

    out_of_domain: tuple[SourceSpec, ...]
    in_domain: tuple[SourceSpec, ...] = ()
    rows: int = 1000
    answers: int = 0


@dataclass(frozen=True)
class Recipe:
    """The whole run. What, up to `compare`; how and where, from `place` on: never part of a key.

    Attributes:
        model: directory or hub id of the full model.
        calibration_rows: packed corpus rows that Taylor scores and SparseGPT are calibrated on.
        compensate: stand-ins for what was removed, fitted between pruning and alignment.
        nf4: QLoRAM: quantise the pruned and aligned model before SFT.
        distil: align towards the large model's answers instead of the next token.
        offset: put the small model's residual stream where the full one's is, in SFT.
        compare: what to train on the full model beside LoRAM: `lora`; `qlora`; `bound`, LoRA at the
            positions that pruning keeps alone.
        store, tracking: directory of results and MLflow server; empty for the default ones.
    """

    name: str
    model: str
    corpus: Corpus
    instruct: Instruct
    evaluate: Evaluate
    prune: PruneConfig = PruneConfig()
    calibration_rows: int = 32
    compensate: CompensateConfig = CompensateConfig()
    align: TrainConfig = TrainConfig(steps=400, lr=5e-5)
    distil: DistilConfig = DistilConfig()
    nf4: bool = True
    offset: OffsetConfig = OffsetConfig()
    adapter: AdapterConfig = AdapterConfig()
    sft: TrainConfig = TrainConfig(steps=400, lr=1e-3)
    compare: tuple[str, ...] = ("lora",)
    place: Place = Place()
    store: str = ""
    tracking: str = ""
    experiment: str = "loram"


def changed(settings: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """Settings as nested dicts with `key=value` changes put in; keys dotted, values JSON or text.

    Raises:
        UserError: no such key.
    """
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            refuse("argument", repr(change), "key=value")
        _put(settings, key, value)
    return settings


def _put(settings: dict[str, Any], key: str, value: str) -> None:
    *parents, last = key.split(".")
    node: Any = settings
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
        known = _keys(settings)
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        refuse("recipe key", repr(key), ", ".join(near or known))
    try:
        node[last] = json.loads(value)
    except ValueError:
        node[last] = value


def _keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in settings.items():
        inner = _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
        keys += inner
    return keys


def parsed(settings: dict[str, Any]) -> Recipe:
    """The recipe of nested dicts.

    Raises:
        UserError: an unknown or a missing key, or a value of another type.
    """
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(settings), strict=True, extra="forbid")
    except ValidationError as failure:
        unknown = "unexpected_keyword_argument"
        error = min(failure.errors(), key=lambda e: e["type"] != unknown)
        key = ".".join(str(part) for part in error["loc"])
        if error["type"] == unknown:
            refuse("recipe key", repr(key), "a key of the recipe")
        if error["type"] == "missing":
            refuse(key, "nothing", "a value")
        refuse(key, json.dumps(error["input"]), error["msg"].removeprefix("Input should be "))


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write the resolved recipe as JSON that `resolve` reads back, without passwords in URIs."""
    text = json.dumps(dataclasses.asdict(recipe), indent=1)
    file.write_text(redact(text) + "\n")


def flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe as flat dotted keys, the names that MLflow shows; sources as their paths."""

    def walk(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict):
            found: dict[str, Any] = {}
            for name, inner in value.items():
                found |= walk(inner, f"{prefix}.{name}" if prefix else name)
            return found
        return {prefix: value if isinstance(value, int | float | str) else json.dumps(value)}

    return walk(dataclasses.asdict(recipe), "")
