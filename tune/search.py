"""One search: Optuna proposes, ASHA stops, Ray Tune runs; all trials start from one small model.

A search that was killed is played again: the trials that its notes hold go first, with their
values, and the store has what they trained. (The restoring of Ray Tune goes back to its last
snapshot, and a trial that was proposed after that is neither run nor proposed again.)
"""

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from loram.errors import refuse
from pipelines.place import Place
from pipelines.recipe import Recipe
from pipelines.step import Source
from tune.rungs import FACTOR, rungs, stopped
from tune.space import Range, Value, replaced
from tune.trial import trial

TRIAL_BYTES = 300e6  # that the process of a trial takes; its training is another
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


def capacity(place: Place, asked: int | None) -> int:
    """How many trials run at a time: those asked for, or all that fit.

    Raises:
        UserError: fewer than one fit, or fewer than were asked for.
    """
    if os.environ.get("RAY_ADDRESS") and asked:
        return asked  # a cluster that may grow
    cluster = ray.cluster_resources()
    cpus, gpus = place.workers * place.cpus_per_worker, place.workers * place.gpus_per_worker
    room = min(int(cluster.get(name, 0) // n) for name, n in (("CPU", cpus), ("GPU", gpus)) if n)
    if room < (asked or 1):
        found = f"{asked or 1} trials of {cpus} CPUs and {gpus} GPUs each"
        refuse("--concurrent", found, f"at most {room} on this cluster")
    return asked or room


def search(
    group: dict[str, Value],
    recipe: Recipe,
    searched: dict[str, Range | list[Value]],
    model: Source,
    sources: dict[str, Source],
    directory: Path,
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
        directory: of this group alone; its notes are kept, so that the same sweep goes on.
    """
    notes = directory / "notes.jsonl"
    notes.parent.mkdir(parents=True, exist_ok=True)
    begun, ended = _played(notes)
    given = tune.with_parameters(
        trial, recipe=recipe, model=model, sources=sources, store=store, notes=notes, ended=ended
    )
    # Its training has CPUs of its own, and Tune wants a trial to ask for something.
    trainable = tune.with_resources(given, {"memory": TRIAL_BYTES})
    domains = {key: _domain(found) for key, found in searched.items()}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other kind prints boxes whatever the verbosity
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    shutil.rmtree(directory / "tune", ignore_errors=True)
    first = (*rungs(recipe.sft), recipe.sft.steps)[0]
    tuner = tune.Tuner(
        trainable,
        param_space=domains,
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                metric="held_out_loss",
                mode="min",
                points_to_evaluate=begun[:trials] or None,
                seed=seed + len(begun),  # the first proposals of the same seed are among them
            ),
            scheduler=ASHAScheduler(
                time_attr="step",
                metric="held_out_loss",
                mode="min",
                grace_period=first,
                reduction_factor=FACTOR,
                max_t=recipe.sft.steps + 1,  # a trial that gets to max_t would be killed
            ),
            num_samples=trials if domains else 1,
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


class _Ends(tune.Callback):
    """Notes where a trial ended, so that it ends there when the search is played again."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with self.notes.open("a") as file:
            note = {"values": trial.config, "ended": trial.last_result.get("step", 0)}
            file.write(json.dumps(note) + "\n")


def _played(notes: Path) -> tuple[list[dict[str, Value]], list[tuple[dict[str, Value], int]]]:
    """What earlier drivers left: the values of every trial, and of those that ended, the step."""
    begun: list[dict[str, Value]] = []
    ended: list[tuple[dict[str, Value], int]] = []
    lines = notes.read_text().splitlines(keepends=True) if notes.exists() else []
    for note in (json.loads(line) for line in lines if line.endswith("\n")):
        if note["values"] and note["values"] not in begun:
            begun.append(note["values"])
        if "ended" in note:
            ended.append((note["values"], note["ended"]))
    return begun, ended


def _domain(found: Range | list[Value]) -> Any:
    if isinstance(found, list):
        return tune.choice(found)
    if isinstance(found.low, int) and isinstance(found.high, int):
        return tune.lograndint(found.low, found.high + 1)
    return tune.loguniform(found.low, found.high)


def _outcome(group: dict[str, Value], recipe: Recipe, searched: list[str], result: Any) -> Outcome:
    metrics = result.metrics or {}
    values = {key: result.config[key] for key in searched}
    step = int(metrics.get("step", 0))
    lines = str(metrics.get("error") or result.error or "").strip().splitlines()
    return Outcome(
        Path(result.path).name.split("_")[1],
        stopped(replaced(recipe, values), step),
        group | values,
        step,
        float(metrics.get("held_out_loss", math.inf)),
        lines[-1] if lines else "",
    )
