"""What a study leaves: its table, its picture, a self-contained page and `study.json`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipelines.report import SCORE, html_table, paragraphs, save, write_page
from tune.draw import picture, seeds
from tune.draw_costs import ORDER, draw_costs
from tune.points import COSTS, Cell, Seen, Spread, means, spread

TITLES = {
    "steps": "perplexity over the steps of SFT",
    "recovery": "with and without recovery and alignment",
    "ratio": "perplexity and score over the pruning ratio",
    "cost": "what each method costs",
}
MEASURES = {
    "loss": ("loss", 1, ".3f"),
    "perplexity": ("ppl in", 1, ",.2f"),
    "out_of_domain_perplexity": ("ppl out", 1, ",.2f"),
    "score": ("score, %", 100, ".1f"),
    "reduction": ("reduction", 1, ".2f"),
}
SPENT = {"tokens": ("tokens", 1), "seconds": ("seconds", 1), "peak_memory_bytes": ("peak, MB", 1e6)}


def table(seen: Seen) -> Table:
    """The table for a terminal."""
    title = f"LoRAM study {seen.study.name}: {TITLES[seen.study.name]}"
    head, body, said = *_results(seen), notes(seen)
    if seen.study.name == "cost":
        head, body, said = *_costs(seen), [COST_NOTE, *lost(seen)]
    drawn = Table(title=title, caption=escape("\n".join(said)), caption_justify="left")
    for name in head:
        words = name in ("model", "inference", "rate", "arm", "stage")
        drawn.add_column(name, justify="left" if words else "right")
    for row in body:
        drawn.add_row(*map(escape, row))
    return drawn


def write(out: Path, seen: Seen, recipe: dict[str, Any], versions: dict[str, str]) -> None:
    """Write `report.html`, `study.json` and the picture as SVG and PNG to the directory `out`.

    Args:
        recipe: flat resolved recipe.
    """
    (out / "study.json").write_text(json.dumps(_plain(seen), indent=1))
    name = seen.study.name
    images = save(out, {name: draw_costs(seen) if name == "cost" else picture(seen)})
    body = (
        f"<p>{TITLES[name].capitalize()}.</p>{images}"
        + html_table(*_results(seen))
        + paragraphs(notes(seen))
        + "<h2>Cost</h2>"
        + html_table(*_costs(seen))
        + paragraphs([COST_NOTE])
    )
    write_page(out, f"LoRAM study {name}: {seen.study.recipe.name}", body, recipe, versions)


def scores(seen: Seen) -> dict[str, float]:
    """The means at the end of training under flat names, for MLflow."""
    found: dict[str, float] = {}
    for cell, spreads in means(seen.points).items():
        if cell.step not in (None, seen.study.stops[-1]):
            continue
        ratio = f"{cell.ratio:g}" if seen.study.name == "ratio" and cell.ratio is not None else ""
        plain = "not-aligned" if seen.study.name == "recovery" and cell.aligned is False else ""
        parts = [cell.model, ratio, plain, cell.inference, cell.rate]
        name = "/".join(part for part in parts if part)
        found |= {f"{name}/{measure}": one.mean for measure, one in spreads.items()}
    return found


COST_NOTE = (
    "seconds: of training in optimiser steps, without the start of its workers; of other stages "
    "from start to end, when they ran. peak: of one process, on the GPU or resident. "
    "SFT, other rates: all that ended, tried to find the own best one. Trainings may have run side "
    "by side, where there was room."
)


def lost(seen: Seen) -> list[str]:
    """What was left out, and why."""
    return [f"Not chosen, its training failed: {name} ({why})" for name, why in seen.lost.items()]


def notes(seen: Seen) -> list[str]:
    """What a reader must know to read the table and the picture rightly."""
    study, shared = seen.study, f"{seen.study.recipe.sft.lr:g}"
    several = len(study.seeds) > 1
    lines = [f"{seeds(seen).capitalize()}" + ("; written mean ± deviation." if several else ".")]
    if study.rates:
        rates = ", ".join(f"{rate:g}" for rate in study.candidates)
        lines.append(
            f"rate: shared is sft.lr {shared}; best is, for each small model and for the full one, "
            f"that of {rates} with the lowest held-out loss of the model the adapter was trained "
            "on, mean over seeds."
        )
        if not study.recipe.evaluate.in_domain:
            lines.append(
                "The recipe has no evaluate.in_domain: the in-domain rows are the held-out ones "
                "by which rates were chosen, the out-of-domain ones are not."
            )
    else:
        lines.append(f"Every method at the shared rate alone, sft.lr {shared}: no --rates given.")
    lines += lost(seen)
    lines.append(
        "loss: nats a trained token, held out, in domain. inference: large is the full model with "
        "the recovered adapter, small the small model with its adapter, untrained the small model "
        "without one. reduction: bytes of the full model in bf16 over those held in training."
    )
    if study.name == "steps":
        lines.append("A step's adapter is the one with the best held-out loss up to there.")
    if any(point.row.score is not None for point in seen.points):
        lines.append(f"score: {SCORE}, of at most {study.recipe.evaluate.answers}.")
    elif study.recipe.evaluate.answers:
        lines.append("No score: no held-out answer ends with a number after ####.")
    return lines


def _results(seen: Seen) -> tuple[list[str], list[list[str]]]:
    """A row a cell; of the columns that tell cells apart, those that differ in this study."""
    found = means(seen.points)
    where = {"steps": ["step"], "recovery": ["aligned"], "ratio": ["ratio"], "cost": []}
    told = ["model", *where[seen.study.name], "inference", "rate", "lr"]
    measured = [name for name in MEASURES if any(name in spreads for spreads in found.values())]
    body = [
        [_said(cell, name) for name in told] + [_text(spreads.get(m), m) for m in measured]
        for cell, spreads in found.items()
    ]
    return told + [MEASURES[name][0] for name in measured], body


def _said(cell: Cell, name: str) -> str:
    value = getattr(cell, name)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value or "-")


def _text(found: Spread | None, measure: str) -> str:
    _, scale, spec = MEASURES[measure]
    return _shown(found, scale, spec)


def _shown(found: Spread | None, scale: float, spec: str) -> str:
    if found is None:
        return "-"
    deviation = f" ± {scale * found.sd:{spec}}" if found.n > 1 else ""
    return f"{scale * found.mean:{spec}}{deviation}"


def _costs(seen: Seen) -> tuple[list[str], list[list[str]]]:
    """A row a stage of each arm."""
    places = dict.fromkeys((cost.arm, cost.stage) for cost in seen.costs)
    arms = list(dict.fromkeys(arm for arm, _ in places))
    body = []
    for arm, stage in sorted(places, key=lambda p: (arms.index(p[0]), ORDER.index(p[1]))):
        mine = [cost for cost in seen.costs if (cost.arm, cost.stage) == (arm, stage)]
        spreads = {name: spread(getattr(cost, name) for cost in mine) for name in COSTS}
        cells = [
            _shown(one, 1 / SPENT[name][1], ",.1f" if name == "seconds" else ",.0f")
            for name, one in spreads.items()
        ]
        body.append([arm, stage, *cells])
    return ["arm", "stage", *(name for name, _ in SPENT.values())], body


def _plain(seen: Seen) -> dict[str, Any]:
    """The whole answer in JSON's types; `table.json` of a pipeline's report is like its points."""
    study = seen.study
    return {
        "study": study.name,
        "recipe": study.recipe.name,
        "seeds": study.seeds,
        "shared_rate": study.recipe.sft.lr,
        "rates": study.candidates if study.rates else [],
        "best_rates": seen.best if study.rates else {},
        "failed": seen.lost,
        "points": [
            {**asdict(point.cell), "seed": point.seed, **asdict(point.row)} for point in seen.points
        ],
        "means": [
            {**asdict(cell), **{name: asdict(one) for name, one in spreads.items()}}
            for cell, spreads in means(seen.points).items()
        ],
        "costs": [asdict(cost) for cost in seen.costs],
    }
