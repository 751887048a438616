"""The steps that make the small model behave like the large one: compensation, distillation,
offsets."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

import loram.compensate
from loram.adapter import recover
from loram.compensate import CompensateConfig
from loram.distil import DistilConfig, write_targets
from loram.errors import refuse
from loram.loss import Batch
from loram.model import read_config
from loram.offsets import corrected, write_offsets
from loram.packing import Packed, batches, order
from loram.plan import size
from loram.shards import link
from loram.train import TrainConfig
from pipelines.fit import fit, latest_checkpoint
from pipelines.place import Place
from pipelines.step import Metrics


@dataclass(frozen=True)
class StandInsConfig:
    """As in the recipe: offsets decide what stand-ins have to make up for."""

    compensate: CompensateConfig
    offset_every: int


def compensate(
    config: StandInsConfig,
    *,
    model: str,
    pruned: Path,
    corpus: Path | None = None,
    instruct: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Fit low-rank stand-ins for what was removed, on general text, on the task, or on both."""
    data = [path for path in (corpus, instruct) if path]
    packed = [Packed(path / "train") for path in data]
    # A task may have few.
    counts = [min(config.compensate.rows // len(data), rows.rows) for rows in packed]
    rows = [
        batches(rows, range(count), place.micro_batch)
        for rows, count in zip(packed, counts, strict=True)
    ]
    options = {"work": place.spool(work), "device": place.device, "dtype": torch.bfloat16}
    layers = corrected(read_config(pruned), config.offset_every)
    fitted = chain(*rows), config.compensate
    found = loram.compensate.compensate(model, pruned, out, *fitted, offsets=layers, **options)
    stand_ins = size(read_config(out)).stand_ins
    return found | {"stand_in_parameters": stand_ins, "peak_memory_bytes": place.peak_memory()}


@dataclass(frozen=True)
class TargetsConfig:
    """top, hidden_layers: what is kept, as in `DistilConfig`. rows, seed: how many rows alignment
    reads in all, and in which order: those of them that differ are needed."""

    top: int
    hidden_layers: int
    rows: int
    seed: int


def targets(
    config: TargetsConfig, *, model: str, corpus: Path, out: Path, work: Path, place: Place
) -> Metrics:
    """What the large model makes of the rows that distillation will read."""
    packed = Packed(corpus / "train")
    ids = np.unique(order(packed.rows, config.rows, config.seed))
    rows = list(batches(packed, ids, place.micro_batch))
    kept = DistilConfig(top=config.top, hidden_layers=config.hidden_layers)
    options = {"work": place.spool(work), "device": place.device, "dtype": torch.bfloat16}
    found = write_targets(model, out, rows, kept, **options)
    return found | {"peak_memory_bytes": place.peak_memory()}


@dataclass(frozen=True)
class DistilledConfig:
    """train: as of alignment. distil: how the losses are weighed."""

    train: TrainConfig
    distil: DistilConfig


def distil(
    config: DistilledConfig,
    *,
    pruned: Path,
    corpus: Path,
    targets: Path,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Alignment towards the large model's targets instead of the next token."""
    return fit(
        "align",
        model=pruned,
        train=corpus / "train",
        held_out=corpus / "held_out",
        config=config.train,
        adapter=None,
        place=place,
        out=out,
        work=work,
        distil=config.distil,
        targets=targets,
    )


@dataclass(frozen=True)
class OffsetsConfig:
    """every: as in `OffsetConfig`. rows, seed: as in `TargetsConfig`, of SFT; of these rows in
    their order from `first` to before `end`."""

    every: int
    rows: int
    seed: int
    first: int
    end: int


def offsets(
    config: OffsetsConfig,
    *,
    model: str,
    small: Path,
    instruct: Path,
    earlier: Path | None = None,
    pruned: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """By how much the small model's residual stream is off on the rows that SFT will read; after an
    `earlier` part of it, with the adapter that it left."""
    tokens, adapters = 0, None
    if earlier and pruned:
        adapters = latest_checkpoint(earlier) / "adapter", work / "recovered"
        recover(adapters[0], pruned, model, adapters[1])
    for part in ("train", "held_out"):
        packed = Packed(instruct / part)
        ids = np.arange(packed.rows)
        if part == "train":
            read = order(packed.rows, config.rows, config.seed)
            ids = np.unique(read[config.first : config.end])
        rows = list(batches(packed, ids, place.micro_batch))
        options: dict[str, Any] = {"device": place.device, "dtype": torch.bfloat16}
        options |= {"work": place.spool(work) / part, "adapters": adapters}
        made = place.spool(work) / f"{part}.made"
        if not made.exists():  # another attempt may have come so far
            partial = made.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_offsets(model, small, partial, rows, config.every, **options)
            partial.rename(made)
        shutil.copytree(made, out / part, copy_function=link)
        tokens += round(len(ids) * packed.seq_len * (1 - packed.info["padding"]))
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    return {"bytes": written, "tokens": tokens, "peak_memory_bytes": place.peak_memory()}


def calibration(corpus: Path, count: int, place: Place) -> tuple[Iterator[Batch], int]:
    """The first packed rows of the corpus, and their number of tokens.

    Raises:
        UserError: it has fewer.
    """
    packed = Packed(corpus / "train")
    if count > packed.rows:
        refuse("calibration_rows", count, f"at most {packed.rows}, the packed rows of the corpus")
    return batches(packed, range(count), place.micro_batch), count * packed.seq_len
