"""A trial: the SFT of a recipe with fields replaced, through the store, rung by rung.

Between rungs nothing of a trial runs: stopping it there leaves no worker behind.
"""

import math
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from loram.errors import UserError, refuse
from pipelines.execute import StepFailed, execute
from pipelines.graph import build
from pipelines.recipe import Recipe
from pipelines.step import Metrics, Source, Step
from pipelines.store import Store
from tune.notes import Notes
from tune.rungs import goes_on, going_on, rungs, sft_of, stopped
from tune.space import Value, replaced


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
    before: Step | None = None
    for step in [*rungs(recipe.sft), recipe.sft.steps]:
        if step > last:
            return
        sft = sft_of(build(stopped(recipe, step), model, sources))
        earlier = goes_on(before, sft, shelf.entry(before.slug)) if before else {}
        launch = partial(_training, earlier)
        try:
            execute([sft], shelf, launch, recipe.place, lambda event: None)
            loss = shelf.record(sft.slug)["metrics"]["held_out_loss"]
        except (UserError, StepFailed, OSError) as failure:
            return tell(step, math.inf, str(failure))
        tell(step, loss, "")
        before = sft


def _training(earlier: dict[str, Path], step: Step, *rest: Any) -> "Future[Metrics]":
    """Start a part of the training, from the rung before, or the offsets of its rows, which a
    searched field may choose: what else it needs was made before the search."""
    if step.name not in ("offsets", "sft"):
        refuse("store", f"one from which {step.slug} has gone", "one that stays during a sweep")
    return going_on(earlier, step, *rest)
