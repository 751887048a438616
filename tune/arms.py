"""What a study asks, and the models on which adapters are trained to answer it."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loram.errors import refuse
from loram.prune import METHODS, STRUCTURED, PruneConfig, ratio
from pipelines.graph import Graph, Variant
from pipelines.recipe import Recipe
from pipelines.recipes import resolve

STUDIES = ("steps", "recovery", "ratio", "cost")
RATIOS = (0.65, 0.75, 0.85, 0.95)  # of the paper's 70B experiments
FULL = {"lora": "LoRA", "qlora": "QLoRA"}  # trained on the full model
ANSWERS = 50  # problems behind the score over the ratio, unless the recipe says how many


@dataclass(frozen=True)
class Arm:
    """A frozen model, small or full, on which adapters are trained at several rates and seeds.

    label: the method; title: also what else tells it from the study's other arms. recipe: of which
    seeds and rate are replaced.
    """

    label: str
    title: str
    recipe: Recipe
    full: bool = False

    def models(self, study: str, graph: Graph) -> dict[str, Variant]:
        """What the study evaluates of a training, by the inference that it is."""
        if self.full:
            return {"full": graph.variants[1]}
        *_, small, large = graph.variants
        if study == "recovery":
            return {"large": large, "small": small}
        return {"large": large} | ({"untrained": graph.untrained} if study == "ratio" else {})


@dataclass(frozen=True)
class Study:
    """A question and its settings. rates: beside the shared one, `recipe.sft.lr`, in the search
    for each arm's own best; empty for none."""

    name: str
    recipe: Recipe
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    arms: tuple[Arm, ...]

    @property
    def candidates(self) -> list[float]:
        """The rates of an arm's trainings, the shared one first."""
        return list(dict.fromkeys([self.recipe.sft.lr, *self.rates]))

    @property
    def stops(self) -> list[int]:
        """The steps of SFT at which adapters are evaluated: each evaluation, or the end alone."""
        sft = self.recipe.sft
        inner = range(sft.eval_every, sft.steps, sft.eval_every) if self.name == "steps" else ()
        return [*inner, sft.last]


def ask(
    name: str,
    recipe: str,
    changes: list[str],
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[str] = ("0",),
    rates: Sequence[str] | None = None,
    ratios: Sequence[str] | None = None,
) -> Study:
    """The study that a person asks for.

    Args:
        recipe, changes: as for `resolve`.
        methods, seeds, rates, ratios: as they were typed; None for what was left out.

    Raises:
        UserError: something that the study cannot be asked with.
    """
    if name not in STUDIES:
        refuse("study", repr(name), ", ".join(STUDIES))
    typed = {change.partition("=")[0] for change in changes}
    if "prune.method" in typed:
        refuse("prune.method", "a change of the recipe", f"--methods {' '.join(METHODS)}")
    if "prune.ratio" in typed and name == "ratio":
        refuse("prune.ratio", "a change of the recipe", "--ratios 0.65 0.75 ...")
    if ratios is not None and name != "ratio":
        refuse("--ratios", f"the study {name}", "the study ratio, or prune.ratio=0.65")
    found = resolve(recipe, changes)
    _check(name, found)
    for method in _different("--methods", methods):
        if method not in METHODS:
            refuse("--methods", repr(method), ", ".join(METHODS))
    chosen_seeds = _numbers("--seeds", seeds, int, lambda n: n >= 0, "whole numbers from 0")
    chosen_rates: tuple[float, ...] = ()
    if rates is not None:
        chosen_rates = _numbers("--rates", rates, float, lambda x: x > 0, "numbers above 0")
    chosen_ratios: tuple[float, ...] = ()
    if ratios is not None:
        inside = "numbers in [0, 1)"
        chosen_ratios = _numbers("--ratios", ratios, float, lambda x: 0 <= x < 1, inside)
    if name == "ratio" and not found.evaluate.answers and "evaluate.answers" not in typed:
        evaluate = dataclasses.replace(found.evaluate, answers=ANSWERS)
        found = dataclasses.replace(found, evaluate=evaluate)
    arms = [
        Arm(FULL[full], FULL[full], dataclasses.replace(found, compare=(full,)), True)
        for full in found.compare
    ]
    for method in methods:
        for prune in _prunings(name, found, method, chosen_ratios, "prune.ratio" in typed):
            arms += _small(name, dataclasses.replace(found, prune=prune, compare=()))
    return Study(name, found, chosen_seeds, chosen_rates, tuple(arms))


def _check(name: str, recipe: Recipe) -> None:
    if unknown := sorted(set(recipe.compare) - FULL.keys()):
        refuse("compare", f"{unknown[0]!r} in a study", ", ".join(FULL))
    if len(set(recipe.compare)) < len(recipe.compare):
        refuse("compare", json.dumps(recipe.compare), "each once")
    if name == "recovery" and not recipe.align.steps:
        refuse("align.steps", "0 in the study recovery", "1 or more: it compares alignment")
    if recipe.sft.stop is not None:
        refuse("sft.stop", f"{recipe.sft.stop} in a study", "null")
    if name == "steps" and not 0 < recipe.sft.eval_every < recipe.sft.steps:
        found = f"{recipe.sft.eval_every} with sft.steps {recipe.sft.steps}"
        refuse("sft.eval_every", found, "fewer steps: each evaluation is a point of the study")


def _prunings(
    study: str, recipe: Recipe, method: str, ratios: tuple[float, ...], typed: bool
) -> list[PruneConfig]:
    """The prunings of a method. A ratio that was not asked for is of groups: `unst` has its own,
    and that of `semi` is its pattern's."""
    groups = method in STRUCTURED
    own = typed or (groups and recipe.prune.method in STRUCTURED)
    several: Sequence[float | None] = [recipe.prune.ratio if own else None]
    if study == "ratio":
        several = ratios or (RATIOS if groups else [None])
    if method == "semi":
        several = [None]
    prunings = [dataclasses.replace(recipe.prune, method=method, ratio=one) for one in several]
    return [dataclasses.replace(prune, ratio=ratio(prune)) for prune in prunings]


def _small(study: str, recipe: Recipe) -> list[Arm]:
    """The small models of one pruning."""
    label = ("QLoRAM-" if recipe.nf4 else "LoRAM-") + recipe.prune.method.capitalize()
    if study == "ratio":
        return [Arm(label, f"{label} {recipe.prune.ratio:g}", recipe)]
    if study != "recovery":
        return [Arm(label, label, recipe)]
    plain = dataclasses.replace(
        recipe,
        align=dataclasses.replace(recipe.align, steps=0),
        distil=dataclasses.replace(recipe.distil, top=0),
    )
    return [Arm(label, f"{label}, aligned", recipe), Arm(label, f"{label}, not aligned", plain)]


def _different(setting: str, values: Sequence[Any]) -> Sequence[Any]:
    if not values:
        refuse(setting, "none", "one or more")
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        refuse(setting, f"{repeated[0]} twice", "each once")
    return values


def _numbers(
    setting: str,
    texts: Sequence[str],
    kind: type,
    allowed: Callable[[Any], bool],
    accepted: str,
) -> tuple[Any, ...]:
    found = []
    for text in texts:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            refuse(setting, repr(text), accepted)
        found.append(number)
    return tuple(_different(setting, found))
