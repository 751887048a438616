"""A trial: the SFT of a recipe with fields replaced, through the store, rung by rung.

A rung is a recipe of its own with `sft.stop`, so what a stopped trial leaves is an ordinary result
of an ordinary recipe. The next rung, and the whole training, go on from its checkpoint, which
gives the same bytes as training in one go. Between rungs nothing of a trial runs: stopping it
there leaves no worker behind.
"""

import dataclasses
import json
import math
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from loram.errors import UserError
from loram.train import TrainConfig
from pipelines.execute import StepFailed, execute
from pipelines.fit import STATE
from pipelines.graph import Graph, build
from pipelines.launch import ray_launch
from pipelines.recipe import Recipe
from pipelines.step import Metrics, Source, Step
from pipelines.store import Store
from tune.space import Value, replaced

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
    """The recipe of a trial that ended after `step` steps of SFT."""
    stop = None if step >= recipe.sft.steps else step
    return dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, stop=stop))


def sft_of(graph: Graph) -> Step:
    """The training of the adapter that a graph is about."""
    step = graph.variants[-1].sft
    assert step is not None
    return step


def trial(
    config: dict[str, Value],
    *,
    recipe: Recipe,
    model: Source,
    sources: dict[str, Source],
    store: Path,
    notes: Path,
    ended: list[tuple[dict[str, Value], int]],
) -> None:
    """What Ray Tune runs: reports `step` and `held_out_loss` at every rung and at the end.

    What fails, divergence and lost memory too, is reported as `error`, with an infinite loss.

    Args:
        config: the values of the searched fields.
        notes: the file that the driver follows: a JSON line a report.
        ended: the values of trials that ended under an earlier driver, and at which step.
    """
    name = tune.get_context().get_trial_id()

    def tell(**said: Any) -> None:
        with notes.open("a") as file:
            file.write(json.dumps({"trial": name, "values": config, **said}) + "\n")
        if said:
            tune.report(said)

    tell()
    recipe, shelf = replaced(recipe, config), Store(store)
    earlier: Path | None = None
    last = next((step for values, step in ended if values == config), recipe.sft.steps)
    for step in [*rungs(recipe.sft), recipe.sft.steps]:
        if step > last:
            return
        sft = sft_of(build(stopped(recipe, step), model, sources))
        launch = partial(_going_on, sft.key, earlier)
        try:
            execute([sft], shelf, launch, recipe.place, lambda event: None)
        except (UserError, StepFailed) as failure:
            return tell(step=step, held_out_loss=math.inf, error=str(failure))
        loss = shelf.record(sft.slug)["metrics"]["held_out_loss"]
        tell(step=step, held_out_loss=loss, error="")
        earlier = shelf.entry(sft.slug)


def _going_on(
    key: str,
    earlier: Path | None,
    step: Step,
    inputs: dict[str, Any],
    out: Path,
    work: Path,
    place: Any,
) -> "Future[Metrics]":
    """Start the step; a training from the checkpoint of the rung before, if it has none."""
    if earlier and step.key == key and not (work / "run").exists():
        shutil.copytree(earlier / STATE, work, dirs_exist_ok=True)
    return ray_launch(step, inputs, out, work, place)
