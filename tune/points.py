"""What a study saw: evaluated models and costs, a point a seed, and their means over seeds."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.results import Row
from pipelines.step import Step, topological_order
from pipelines.store import Store
from tune.arms import Study
from tune.rungs import anew

STAGES = {
    "score": "score",
    "prune": "prune",
    "compensate": "compensate",
    "targets": "targets",
    "align": "align",
    "distil": "align",
    "compress": "quantise",
    "quantise": "quantise",
    "quantise_full": "quantise",
    "offsets": "offsets",
    "sft": "SFT",
    "sft_lora": "SFT",
    "sft_qlora": "SFT",
}
SEARCH = "SFT, other rates"
MEASURED = ("loss", "perplexity", "out_of_domain_perplexity", "score", "reduction")
COSTS = ("tokens", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Cell:
    """What was evaluated, but for the seed.

    Attributes:
        model: base, LoRA, QLoRAM-Stru, ...
        inference: full: the full model; large: the full model with a recovered adapter; small: the
            small model with its adapter; untrained: the small model without one.
        rate: shared, best (the arm's own), or empty where nothing was trained.
        step: of SFT, where its training ended.
        ratio, aligned: of the small model; None where there is none.
    """

    model: str
    inference: str
    rate: str = ""
    lr: float | None = None
    step: int | None = None
    ratio: float | None = None
    aligned: bool | None = None


@dataclass(frozen=True)
class Point:
    """One evaluated model. seed: None for the base."""

    cell: Cell
    seed: int | None
    row: Row


@dataclass(frozen=True)
class Cost:
    """What a stage of an arm took with one seed.

    tokens: without padding, None if it reads none. seconds: of training in optimiser steps, of
    anything else from its start to its end. peak_memory_bytes: of one process.
    """

    arm: str
    stage: str
    seed: int
    tokens: float | None
    seconds: float
    peak_memory_bytes: float | None


@dataclass(frozen=True)
class Seen:
    """A study's answer. best: each arm's own best rate, by its title. lost: why a training at
    another rate failed, by its name."""

    study: Study
    points: list[Point]
    costs: list[Cost]
    best: dict[str, float]
    lost: dict[str, str]


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (0 of one) and number of values, one a seed."""

    mean: float
    sd: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of the values that are there; None if none is."""
    there = [float(value) for value in values if value is not None]
    if not there:
        return None
    return Spread(
        statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else 0.0, len(there)
    )


def means(points: Iterable[Point]) -> dict[Cell, dict[str, Spread]]:
    """Over the seeds, of each cell the measures that it has, in the order of the points."""
    grouped: dict[Cell, list[Row]] = {}
    for point in points:
        grouped.setdefault(point.cell, []).append(point.row)
    found = {}
    for cell, rows in grouped.items():
        spreads = {name: spread(getattr(row, name) for row in rows) for name in MEASURED}
        found[cell] = {name: one for name, one in spreads.items() if one}
    return found


def costs(arm: str, seed: int, sft: Step, others: Iterable[Step], store: Store) -> list[Cost]:
    """The cost of each stage up to a trained adapter, from the records of finished steps.

    Args:
        sft: the training at the shared rate.
        others: those at other rates that were tried beside it.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    for step in topological_order([sft]):
        # The curve of a training has that of its earlier parts.
        if step.name in STAGES and (step is sft or STAGES[step.name] != "SFT"):
            stages.setdefault(STAGES[step.name], []).append(store.record(step.slug))
    if searched := [step for other in others for step in (other, *anew(other))]:
        stages[SEARCH] = [store.record(step.slug) for step in searched]
    return [_cost(arm, stage, seed, records) for stage, records in stages.items()]


def _cost(arm: str, stage: str, seed: int, records: list[dict[str, Any]]) -> Cost:
    metrics = [record["metrics"] for record in records]
    tokens = [found.get("tokens", found.get("calibration_tokens")) for found in metrics]
    peaks = [found["peak_memory_bytes"] for found in metrics if "peak_memory_bytes" in found]
    # A training that went on from a checkpoint has all its steps in its curve, not in its clock.
    seconds = [m.get("train_seconds", r["seconds"]) for m, r in zip(metrics, records, strict=True)]
    counted = [float(count) for count in tokens if count is not None]
    return Cost(
        arm, stage, seed, sum(counted) if counted else None, sum(seconds), max(peaks, default=None)
    )
