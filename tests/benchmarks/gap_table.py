"""What `gap` found: the README's table and picture."""

import statistics
from collections.abc import Iterable

from matplotlib.figure import Figure

from tests.benchmarks import kept

Model = tuple[str, float | None]  # method and ratio, None where it removes single weights
# Of the picture: its name there, colour (Okabe and Ito) and marker.
DRAWN = {
    "none": ("not aligned", "#999999", "o"),
    "align": ("aligned: the paper's method", "#0072b2", "s"),
    "task": ("stand-ins of the task, on values", "#e69f00", "^"),
    "task, gradients, offsets 30, 2 parts": ("stand-ins and offsets: the default", "#d55e00", "D"),
    "bound": ("LoRA on the full model where pruning keeps", "#009e73", "v"),
}


def models(found: list[dict]) -> list[Model]:
    """Those of the lines, in the order of the table."""
    seen = list(dict.fromkeys((line["method"], line["ratio"]) for line in found))
    return sorted(seen, key=lambda m: (["stru", "rand", "semi", "unst"].index(m[0]), m[1]))


def label(model: Model) -> str:
    """Such as `Stru 0.65`, `Semi`."""
    return f"{model[0]} {model[1] or ''}".strip().title()


def of_cell(found: list[dict], way: str, model: Model) -> list[dict]:
    """A line a seed, of the machine on which there are most seeds, or else the CPU. Of Semi and
    Unst without offsets, where another pruned model on each shows, the CPU if it has any."""
    mine = [x for x in found if (x["method"], x["ratio"]) == model and x["way"] == way]
    on_gpu, on_cpu = ([line for line in mine if line["gpu"] is gpu] for gpu in (True, False))
    of_machine = model[1] is None and "offsets" not in way
    return on_cpu if on_cpu and of_machine else max(on_cpu, on_gpu, key=len)


def shares(lines: list[dict]) -> list[float]:
    """In %; none where full LoRA gained next to nothing."""
    return [100 * line["share"] for line in lines if line["share"] is not None]


def table(ways: Iterable[str], **chosen: object) -> str:
    """As Markdown: share of gain in % / perplexity out of domain, means and deviations of seeds."""
    found = kept("gap", **chosen)

    def cell(way: str, model: Model) -> str:
        lines = of_cell(found, way, model)
        values = shares(lines)
        if not values:
            return "-" if lines else ""
        outside = statistics.mean(line["out_of_domain_perplexity"] for line in lines)
        spread = f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.0f}{spread} / {outside:.2f}"

    rows = [["way", *map(label, models(found))]]
    rows.append(["---"] * len(rows[0]))
    rows += [[way, *(cell(way, model) for model in models(found))] for way in ways]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows if any(row[1:]))


def picture(**chosen: object) -> Figure:
    """Mean and deviation over seeds of the share of gain, a group a model."""
    found = kept("gap", **chosen)
    figure = Figure((9, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (way, (name, colour, marker)) in enumerate(DRAWN.items()):
        drawn = [(x, shares(of_cell(found, way, m))) for x, m in enumerate(models(found))]
        drawn = [(x + 0.13 * (number - 2), values) for x, values in drawn if values]
        axes.errorbar(
            [x for x, _ in drawn],
            [statistics.mean(values) for _, values in drawn],
            [statistics.stdev(values) if len(values) > 1 else 0 for _, values in drawn],
            fmt=marker,
            color=colour,
            capsize=2,
            ms=6,
            label=name,
        )
    for height in (0, 100):
        axes.axhline(height, color="black", lw=0.8, ls=":", zorder=0)
    axes.set_xticks(range(len(models(found))), map(label, models(found)))
    axes.set_ylabel("share of full LoRA's gain (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
