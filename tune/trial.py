"""A trial: the SFT of a recipe with fields replaced, through the store, rung by rung.

A rung is a recipe of its own with `sft.stop`, so what a stopped trial leaves is an ordinary result
of an ordinary recipe. The next rung, and the whole training, go on from its checkpoint, which
gives the same bytes as training in one go. Between rungs nothing of a trial runs: stopping it
there leaves no worker behind.
"""

import dataclasses
import math
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from loram.errors import UserError, refuse
from loram.train import TrainConfig
from pipelines.execute import StepFailed, execute
from pipelines.fit import STATE
from pipelines.graph import Graph, build
from pipelines.launch import ray_launch
from pipelines.recipe import Recipe
from pipelines.step import Metrics, Source, Step
from pipelines.store import Store
from tune.notes import Notes
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
    notes: Notes,
) -> None:
    """What Ray Tune runs: reports `step` and `held_out_loss` at every rung and at the end.

    What fails, divergence and lost memory too, is reported as `error`, with an infinite loss. A
    trial that was over under an earlier driver goes as far as it went then; its reports are marked
    as `again`.

    Args:
        config: the values of the searched fields.
        notes: what the driver follows.
    """
    name, over = tune.get_context().get_trial_id(), notes.ended(config)

    def tell(step: int, loss: float, error: str) -> None:
        said = {"step": step, "held_out_loss": loss, "error": error}
        notes.write(trial=name, values=config, **said)
        tune.report(said | {"again": over is not None})

    notes.write(trial=name, values=config)
    recipe, shelf = replaced(recipe, config), Store(store)
    last = over or recipe.sft.steps
    earlier: Path | None = None
    for step in [*rungs(recipe.sft), recipe.sft.steps]:
        if step > last:
            return
        sft = sft_of(build(stopped(recipe, step), model, sources))
        launch = partial(_going_on, sft.key, earlier)
        try:
            execute([sft], shelf, launch, recipe.place, lambda event: None)
            loss = shelf.record(sft.slug)["metrics"]["held_out_loss"]
        except (UserError, StepFailed, OSError) as failure:
            return tell(step, math.inf, str(failure))
        tell(step, loss, "")
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
    if step.key != key:
        refuse("store", f"one from which {step.slug} has gone", "one that stays during a sweep")
    if earlier and not (work / "run").exists():
        shutil.copytree(earlier / STATE, work, dirs_exist_ok=True)
    return ray_launch(step, inputs, out, work, place)
