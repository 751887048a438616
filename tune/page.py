"""What a sweep leaves: its table, its pictures, and one self-contained page."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from rich.table import Table

from pipelines.recipe import flat
from pipelines.report import html_table, paragraphs, save, write_page
from tune.follow import shown
from tune.plan import Plan
from tune.search import Outcome
from tune.space import Range, Value

COLUMNS = ("steps", "held-out, small", "loss, large", "ppl out, large", "remark")
NOTE = (
    "held-out: loss of the small model, with its offsets if it has any, on held-out rows of the "
    "training source, by which trials were stopped. large: the recovered adapter on the original "
    "model, in domain (nats a trained token) and out of domain. One seed a trial."
)


def best_of(outcomes: list[Outcome], metric: str) -> Outcome | None:
    """The trial with the lowest final `metric`, beside that of the base on the same rows; None if
    none was evaluated."""
    scored = [outcome for outcome in outcomes if metric in outcome.scores]
    return min(scored, key=lambda outcome: _beside_base(outcome, metric), default=None)


def _beside_base(outcome: Outcome, metric: str) -> float:
    """Sweeps over rows or their length have a base for each, and no loss compares with others'."""
    if metric not in outcome.scores:
        return math.inf
    return outcome.scores[metric] - outcome.scores[metric.replace("large", "base")]


def line(plan: Plan, outcome: Outcome) -> str:
    """The arguments with which `pipelines/full.py` repeats the trial."""
    values: dict[str, Any] = dict(outcome.values)
    if outcome.recipe.sft.stop:
        values["sft.stop"] = outcome.recipe.sft.stop
    if outcome.recipe.model != plan.space.recipe.model:  # of the hub, by its commit
        values["model"] = outcome.recipe.model
    words = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return shlex.join([plan.recipe, *plan.plain, "compare=[]", *words])


def table(plan: Plan, outcomes: list[Outcome]) -> Table:
    """The table for a terminal, the best trial first."""
    drawn = Table(title=f"LoRAM sweep {plan.key}", caption=NOTE, caption_justify="left")
    head, body = _rows(plan, outcomes)
    for name in head:
        drawn.add_column(name, justify="left" if name in ("trial", "remark") else "right")
    for row in body:
        drawn.add_row(*map(escape, row))
    return drawn


def write(out: Path, plan: Plan, outcomes: list[Outcome], versions: dict[str, str]) -> None:
    """Write `report.html`, `trials.json` and the plots as SVG and PNG to the directory `out`."""
    trials = [
        {
            "trial": o.name,
            **o.values,
            "steps": o.step if not o.error else None,
            "held_out_loss": o.held_out_loss if not o.error else None,
            **o.scores,
            "error": o.error,
        }
        for o in outcomes
    ]
    (out / "trials.json").write_text(json.dumps(trials, indent=1))
    pictures = {
        f"{plan.metric}-{key}".replace(".", "-"): _draw_scores(plan, outcomes, key)
        for key, found in plan.space.searched.items()
        if any(o.scores for o in outcomes)
    }
    if any(o.curve for o in outcomes):
        pictures["curves"] = _draw_curves(outcomes)
    body = html_table(*_rows(plan, outcomes)) + paragraphs([NOTE]) + save(out, pictures)
    write_page(out, f"LoRAM sweep {plan.key}", body, flat(plan.space.recipe), versions)


def _rows(plan: Plan, outcomes: list[Outcome]) -> tuple[list[str], list[list[str]]]:
    varied = [*plan.space.groups, *plan.space.searched]
    body = []
    for o in sorted(outcomes, key=lambda o: (_beside_base(o, plan.metric), o.name)):
        early = "stopped early" if o.step < o.recipe.sft.steps else ""
        held_out = "-" if o.error else f"{o.held_out_loss:.4f}"
        scores = [f"{o.scores[m]:.4f}" if m in o.scores else "-" for m in METRICS]
        values = [_text(o.values[key]) for key in varied]
        steps = "-" if o.error else str(o.step)
        body.append([o.name, *values, steps, held_out, *scores, o.error or early])
    return ["trial", *varied, *COLUMNS], body


METRICS = ("large_loss", "large_ppl_out")  # of a trial, smaller is better
UNITS = {
    "large_loss": "loss of the large model (nats per trained token)",
    "large_ppl_out": "perplexity of the large model, out of domain",
}


def _draw_scores(plan: Plan, outcomes: list[Outcome], key: str) -> Figure:
    """The final metric over one searched field, a colour a group; early-stopped trials hollow.

    A line joins those that trained to the end and differ in this field alone; others compare with
    each other alone.
    """
    figure = Figure((6.5, 4), layout="constrained")
    axes = figure.subplots()
    groups, alone = plan.space.combinations(), len(plan.space.searched) == 1
    for number, group in enumerate(groups):
        mine = [o for o in outcomes if o.scores and group.items() <= o.values.items()]
        mine.sort(key=lambda o: str(o.values[key]) if isinstance(o.values[key], str) else 0)
        mine.sort(key=lambda o: 0 if isinstance(o.values[key], str) else o.values[key])
        if not mine:
            continue
        name = shown(group) or "all trials"
        for ended, line, fill, label in (
            (True, "o-" if alone else "o", f"C{number}", name),
            (False, "o", "white", ""),
        ):
            these = [o for o in mine if (o.step == o.recipe.sft.steps) == ended]
            x = [o.values[key] for o in these]
            y = [o.scores[plan.metric] for o in these]
            axes.plot(x, y, line, color=f"C{number}", mfc=fill, ms=6, lw=0.8, label=label)
    axes.plot([], [], "o", mec="grey", mfc="white", label="stopped early")
    bases = sorted({o.scores["base_loss"] for o in outcomes if o.scores})
    for number, base in enumerate(bases if plan.metric == "large_loss" else []):
        label = "" if number else "base, not fine-tuned"
        axes.axhline(base, ls="--", color="black", lw=1, label=label)
    if isinstance(plan.space.searched[key], Range):
        axes.set_xscale("log")
        axes.tick_params("x", which="minor", labelsize=7, rotation=30)  # many, in a narrow range
    axes.set_xlabel("learning rate of SFT (sft.lr)" if key == "sft.lr" else key)
    axes.set_ylabel(UNITS[plan.metric])
    axes.set_title("one seed a trial", fontsize=9, loc="right")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_curves(outcomes: list[Outcome]) -> Figure:
    """Held-out loss over steps, a line a trial."""
    figure = Figure((6.5, 4), layout="constrained")
    axes = figure.subplots()
    for number, o in enumerate(outcomes):
        if o.curve is None:
            continue
        lines = [json.loads(text) for text in o.curve.read_text().splitlines()]
        points = [(x["step"], x["held_out_loss"]) for x in lines if "held_out_loss" in x]
        label = shown(o.values)
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{number % 10}", label=label, ms=4)
    axes.set_xlabel("optimiser step of SFT")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("held-out loss of the small model\n(nats per trained token)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _text(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
