"""Training rung by rung: what it would be worth to stop at a step, without training up to it twice.

A rung is a recipe of its own with `sft.stop`, so what was stopped is an ordinary result of an
ordinary recipe. The next rung, and the whole training, go on from its checkpoint, which gives the
same bytes as training in one go.
"""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from loram.train import TrainConfig
from pipelines.fit import STATE
from pipelines.graph import Graph
from pipelines.launch import ray_launch
from pipelines.recipe import Recipe
from pipelines.step import Metrics, Step
from pipelines.worker import RUN

FACTOR = 2  # of the trials at a rung, one in so many goes on


def rungs(config: TrainConfig) -> list[int]:
    """The steps at which a trial may be stopped: from a quarter of the training, then doubling.

    A rung is at an evaluation. Empty if the training is too short to have one.
    """
    every = config.eval_every
    first = every * math.ceil(config.steps / 4 / every)
    found = []
    while first < config.steps:
        found.append(first)
        first *= FACTOR
    return found


def stopped(recipe: Recipe, step: int) -> Recipe:
    """The recipe of a training that ends after `step` steps of SFT."""
    stop = None if step >= recipe.sft.steps else step
    return dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, stop=stop))


def sft_of(graph: Graph) -> Step:
    """The training of the adapter that a graph is about."""
    step = graph.variants[-1].sft
    assert step is not None
    return step


def parts(sft: Step) -> list[Step]:
    """The trainings that lead to this one, the first part first; itself the last."""
    earlier = sft.inputs.get("earlier")
    return [*(parts(earlier) if isinstance(earlier, Step) else []), sft]


def anew(sft: Step) -> list[Step]:
    """The offsets that were found between its parts, which no training at another rate shares."""
    found = [part.inputs["offsets"] for part in parts(sft)[1:]]
    return [step for step in found if isinstance(step, Step)]


def goes_on(before: Step, sft: Step, entry: Path) -> dict[str, Path]:
    """For `going_on`, after a rung before that left `entry`: of the parts of a training the one
    that this was of reads the same. If it went to that part's end, it is that part."""

    def reads(step: Step) -> dict[str, str]:
        return {name: node.key for name, node in step.inputs.items()}

    part = next(part for part in parts(sft) if reads(part) == reads(before))
    return {} if part.key == before.key else {part.key: entry}


def going_on(
    earlier: Mapping[str, Path],
    step: Step,
    inputs: dict[str, Any],
    out: Path,
    work: Path,
    place: Any,
) -> "Future[Metrics]":
    """Start the step; a training that has no checkpoint yet, from that of the rung before.

    Args:
        earlier: the entry of the rung before, by the key of the training that goes on from it.
    """
    if step.key in earlier and not (work / RUN).exists():
        copy = work.with_name(f"{work.name}.earlier")
        try:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(earlier[step.key] / STATE, copy)
            work.mkdir(parents=True, exist_ok=True)
            for child in sorted(copy.iterdir(), key=lambda path: path.name == RUN):  # it, the last
                child.replace(work / child.name)
            copy.rmdir()
        except OSError as error:
            lost: Future[Metrics] = Future()
            lost.set_exception(error)
            return lost
    return ray_launch(step, inputs, out, work, place)
