"""One search: Optuna proposes, ASHA stops, Ray Tune runs; all trials start from one small model.

What Optuna would draw at random, before it has trials to learn from, is spread evenly instead: four
random learning rates may well lie side by side.

A search that was killed is played again: the trials that its notes hold go first, with their
values, and the store has what they trained. What was over is not stopped anew, and what failed is
tried again. (The restoring of Ray Tune goes back to its last snapshot, and a trial that was
proposed after that is neither run nor proposed again.)
"""

import itertools
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from scipy.stats import qmc

from loram.errors import refuse
from pipelines.place import Place
from pipelines.recipe import Recipe
from pipelines.step import Source
from tune.notes import Notes
from tune.rungs import FACTOR, rungs, stopped
from tune.space import Range, Space, Value, replaced
from tune.trial import trial

TRIAL_BYTES = 300e6  # that the process of a trial takes; its training is another
SPREAD = 10  # trials before Optuna proposes: as many as its TPE sampler draws at random
KILLS = 2  # restarts of a trial whose process was killed


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        values: of the fields that the sweep varies.
        step: of SFT, where it ended.
        held_out_loss: of the small model, there; infinite if it failed.
        error: why it failed, or empty.
        scores, curve: once it was evaluated: final metrics, and the file of its training curve.
    """

    name: str
    recipe: Recipe
    values: dict[str, Value]
    step: int
    held_out_loss: float
    error: str
    scores: dict[str, float] = field(default_factory=dict)
    curve: Path | None = None


def check_capacity(place: Place, asked: int | None) -> None:
    """Refuse more trials at a time than fit on this machine, or one if it does not fit.

    Raises:
        UserError: fewer than one fit, or fewer than were asked for.
    """
    room = place.fits([place.machine()])
    if room < (asked or 1):
        cpus, gpus = place.workers * place.cpus_per_worker, place.workers * place.gpus_per_worker
        found = f"{asked or 1} trials of {cpus} CPUs and {gpus} GPUs each"
        refuse("--concurrent" if asked else "place.workers", found, f"at most {room} here")


def search(
    group: dict[str, Value],
    recipe: Recipe,
    searched: dict[str, Range | list[Value]],
    model: Source,
    sources: dict[str, Source],
    notes: Notes,
    *,
    store: Path,
    trials: int,
    concurrent: int,
    seed: int,
) -> list[Outcome]:
    """Run the trials of one group, or what a killed driver left of them to do; all their outcomes.

    Args:
        recipe: with the values of `group` in it.
        searched: the fields that vary within the group.
        notes: of this group alone; they are kept, so that the same sweep goes on.
    """
    given = tune.with_parameters(
        trial, recipe=recipe, model=model, sources=sources, store=store, notes=notes
    )
    # Its training has CPUs of its own, and Tune wants a trial to ask for something.
    trainable = tune.with_resources(given, {"memory": TRIAL_BYTES})
    domains = {key: _domain(found) for key, found in searched.items()}
    points, trials = _points(searched, notes.begun(), trials, seed)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other kind prints boxes whatever the verbosity
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would go on with trials that were cut off
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    directory = notes.file.parent
    shutil.rmtree(directory / "tune", ignore_errors=True)
    trained = [each.sft for each in Space(recipe, {}, searched).recipes_within()]
    tuner = tune.Tuner(
        trainable,
        param_space=domains,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                metric="held_out_loss",
                mode="min",
                points_to_evaluate=points or None,
                seed=seed + len(points),  # the first proposals of the same seed are among them
            )
            if domains
            else None,
            scheduler=_Asha(
                time_attr="step",
                metric="held_out_loss",
                mode="min",
                grace_period=min((*rungs(sft), sft.steps)[0] for sft in trained),
                reduction_factor=FACTOR,
                # A trial that gets to max_t would be killed.
                max_t=max(sft.steps for sft in trained) + 1,
            ),
            num_samples=trials,
            trial_dirname_creator=attrgetter("trial_id"),  # by which an outcome is told
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(directory),
            failure_config=tune.FailureConfig(max_failures=KILLS),
            callbacks=[_Ends(notes)],
            verbose=0,
        ),
    )
    return [_outcome(group, recipe, list(searched), result) for result in tuner.fit()]


class _Asha(ASHAScheduler):
    """Takes note of a trial that is played again, and does not stop it anew."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(controller, trial, result)
        return self.CONTINUE if result["again"] else decision


class _Ends(tune.Callback):
    """Notes where a trial was over, so that it ends there when the search is played again."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not trial.last_result["error"]:
            self.notes.write(values=trial.config, ended=trial.last_result["step"])


def _points(
    searched: dict[str, Range | list[Value]],
    begun: list[dict[str, Value]],
    trials: int,
    seed: int,
) -> tuple[list[dict[str, Value]], int]:
    """The values to try first, and how many trials there are: lists have an end."""
    lists = [found for found in searched.values() if isinstance(found, list)]
    if len(lists) == len(searched) and math.prod(map(len, lists)) <= trials:
        points = [dict(zip(searched, values, strict=True)) for values in itertools.product(*lists)]
        return points, len(points)
    points = list(begun)
    for point in _spread(searched, min(trials, SPREAD), seed):
        if point not in points:  # in a short list, or in few whole numbers, two may be the same
            points.append(point)
    return points[:trials], trials


def _spread(
    searched: dict[str, Range | list[Value]], count: int, seed: int
) -> list[dict[str, Value]]:
    """A Latin hypercube: each field's values are the middles of `count` equal parts (of a range,
    equal in the logarithm), in an order of its own."""
    cells = qmc.LatinHypercube(len(searched), scramble=False, rng=seed).random(count)
    return [
        {
            key: found.at(x) if isinstance(found, Range) else found[int(x * len(found))]
            for (key, found), x in zip(searched.items(), cell, strict=True)
        }
        for cell in cells.tolist()
    ]


def _domain(found: Range | list[Value]) -> Any:
    if isinstance(found, list):
        return tune.choice(found)
    if isinstance(found.low, int) and isinstance(found.high, int):
        return tune.lograndint(found.low, found.high + 1)
    return tune.loguniform(found.low, found.high)


def _outcome(group: dict[str, Value], recipe: Recipe, searched: list[str], result: Any) -> Outcome:
    metrics = result.metrics or {}
    values = {key: result.config[key] for key in searched}
    made, step = replaced(recipe, values), int(metrics.get("step", 0))
    lines = str(metrics.get("error") or result.error or "").strip().splitlines()
    return Outcome(
        Path(result.path).name,
        stopped(made, step) if step else made,  # killed before its first report
        group | values,
        step,
        float(metrics.get("held_out_loss", math.inf)),
        lines[-1] if lines else "",
    )
