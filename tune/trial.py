"""A trial: the SFT of a recipe with fields replaced, through the store, rung by rung.

Between rungs nothing of a trial runs: stopping it there leaves no worker behind.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from loram.errors import UserError
from pipelines.execute import StepFailed, execute
from pipelines.graph import build
from pipelines.recipe import Recipe
from pipelines.step import Source
from pipelines.store import Store
from tune.rungs import going_on, rungs, sft_of, stopped
from tune.space import Value, replaced


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
    before: Path | None = None
    last = next((step for values, step in ended if values == config), recipe.sft.steps)
    for step in [*rungs(recipe.sft), recipe.sft.steps]:
        if step > last:
            return
        sft = sft_of(build(stopped(recipe, step), model, sources))
        launch = partial(going_on, {sft.key: before} if before else {})
        try:
            execute([sft], shelf, launch, recipe.place, lambda event: None)
        except (UserError, StepFailed) as failure:
            return tell(step=step, held_out_loss=math.inf, error=str(failure))
        loss = shelf.record(sft.slug)["metrics"]["held_out_loss"]
        tell(step=step, held_out_loss=loss, error="")
        before = shelf.entry(sft.slug)
