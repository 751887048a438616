"""The pictures of studies. Filled and solid: the shared rate; hollow and dashed: the own best."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from tune.points import Cell, Seen, Spread, means

# Okabe and Ito: told apart by the colour-blind; each method has a marker too, for print without.
STYLES = {
    "Stru": ("#0072b2", "o"),
    "Rand": ("#d55e00", "s"),
    "Semi": ("#009e73", "^"),
    "Unst": ("#cc79a7", "D"),
    "LoRA": ("#444444", "v"),
    "QLoRA": ("#999999", "P"),
}
BASE = Line2D([], [], color="black", ls="--", lw=1.2, label="base, not fine-tuned")
PANELS = {
    "perplexity": "perplexity, in domain",
    "out_of_domain_perplexity": "perplexity, out of domain",
    "score": "right answers, in domain (%)",
}
# of `recovery`: offset beside the method's name, colour, marker
CORNERS = {
    ("large", True): (-0.27, "#0072b2", "o", "recovered, aligned"),
    ("large", False): (-0.09, "#0072b2", "s", "recovered, not aligned"),
    ("small", True): (0.09, "#d55e00", "o", "not recovered, aligned"),
    ("small", False): (0.27, "#d55e00", "s", "not recovered, not aligned"),
}
WIDE = 4.0  # from this ratio of the largest value to the smallest an axis is logarithmic

Means = dict[Cell, dict[str, Spread]]


def picture(seen: Seen) -> Figure:
    """The picture of `steps`, `recovery` or `ratio`: a panel a measure."""
    panel = {"steps": _steps, "recovery": _recovery, "ratio": _ratio}[seen.study.name]
    found = means(seen.points)
    measures = [name for name in PANELS if any(name in spreads for spreads in found.values())]
    size = (4.3 * len(measures), 4.6)
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(size, layout=layout)
    grid = figure.subplots(1, len(measures), squeeze=False)
    for axes, measure in zip(grid[0], measures, strict=True):
        panel(axes, found, measure)
        axes.set_ylabel(PANELS[measure])
        axes.spines[["top", "right"]].set_visible(False)
        values = [spreads[measure].mean for spreads in found.values() if measure in spreads]
        if measure != "score" and max(values) > WIDE * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if measure == "score":
            top = max(5.0, axes.get_ylim()[1])
            axes.set_ylim(-0.03 * top, top)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    handles = _key(found, seen.study.name)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(seeds(seen), fontsize=9)
    return figure


def seeds(seen: Seen) -> str:
    """What error bars say, or that there are none."""
    chosen = seen.study.seeds
    if len(chosen) == 1:
        return f"one seed ({chosen[0]}), no error bars"
    listed = ", ".join(map(str, chosen))
    return f"mean and standard deviation over {len(chosen)} seeds ({listed})"


def style(model: str) -> tuple[str, str]:
    """Colour and marker of a method."""
    return STYLES[model.rpartition("-")[2]]


def _points(
    axes: Axes, at: list[tuple[float, Spread]], colour: str, marker: str, rate: str
) -> None:
    """Points with error bars in the rate's style, joined; percentages where shares are drawn."""
    at = sorted(at, key=lambda pair: pair[0])
    bars = [spread.sd for _, spread in at] if any(spread.n > 1 for _, spread in at) else None
    axes.errorbar(
        [x for x, _ in at],
        [spread.mean for _, spread in at],
        bars,
        ls={"shared": "-", "best": "--", "": ":"}[rate],
        marker=marker if rate else "x",
        color=colour,
        mfc="white" if rate == "best" else colour,
        ms=6 if rate != "best" else 8,  # seen around the filled one where both rates are the same
        zorder=3 if rate != "best" else 2,
        lw=1.2,
        capsize=3,
    )


def _level(axes: Axes, spread: Spread, rate: str, colour: str) -> None:
    """A reference across the panel, and its standard deviation as a band."""
    axes.axhline(spread.mean, ls="-" if rate == "shared" else "--", color=colour, lw=1.2, zorder=1)
    axes.axhspan(spread.mean - spread.sd, spread.mean + spread.sd, color=colour, alpha=0.12, lw=0)


def _of(found: Means, measure: str) -> Means:
    """The cells that have the measure, scores as percentages."""
    scale = 100 if measure == "score" else 1
    chosen = {cell: spreads[measure] for cell, spreads in found.items() if measure in spreads}
    return {
        cell: {measure: Spread(scale * s.mean, scale * s.sd, s.n)} for cell, s in chosen.items()
    }


def _references(axes: Axes, found: Means, measure: str, full: bool) -> None:
    for cell, spreads in found.items():
        if cell.model == "base":
            axes.axhline(spreads[measure].mean, color="black", ls="--", lw=1.2, zorder=1)
        elif full and cell.inference == "full":
            _level(axes, spreads[measure], cell.rate, style(cell.model)[0])


def _lines(axes: Axes, found: Means, measure: str, x: str, inferences: tuple[str, ...]) -> None:
    """A line for each method, inference and rate, over the field `x` of the cells."""
    grouped: dict[tuple[str, str, str], list[tuple[float, Spread]]] = {}
    for cell, spreads in found.items():
        if cell.inference in inferences and cell.model != "base":
            name = cell.model, cell.inference, cell.rate
            grouped.setdefault(name, []).append((getattr(cell, x), spreads[measure]))
    for (model, _, rate), at in grouped.items():
        _points(axes, at, *style(model), rate)


def _steps(axes: Axes, found: Means, measure: str) -> None:
    chosen = _of(found, measure)
    _references(axes, chosen, measure, full=False)
    _lines(axes, chosen, measure, "step", ("full", "large"))
    axes.set_xlabel("optimiser step of SFT")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ratio(axes: Axes, found: Means, measure: str) -> None:
    chosen = _of(found, measure)
    _references(axes, chosen, measure, full=True)
    _lines(axes, chosen, measure, "ratio", ("large", "untrained"))
    axes.set_xlabel("pruning ratio (prune.ratio)")


def _recovery(axes: Axes, found: Means, measure: str) -> None:
    chosen = _of(found, measure)
    _references(axes, chosen, measure, full=True)
    models = list(dict.fromkeys(c.model for c in chosen if c.aligned is not None))
    for cell, spreads in chosen.items():
        if cell.aligned is not None:
            offset, colour, marker, _ = CORNERS[cell.inference, cell.aligned]
            x = models.index(cell.model) + offset
            _points(axes, [(x, spreads[measure])], colour, marker, cell.rate)
    axes.set_xticks(range(len(models)), [model.replace("-", "-\n") for model in models])
    axes.set_xlim(-0.6, len(models) - 0.4)
    axes.tick_params(axis="x", length=0, labelsize=9)


def _key(found: Means, study: str) -> list[Line2D]:
    """The legend: methods by colour, then what the styles mean."""
    lines = [BASE]
    for model in dict.fromkeys(cell.model for cell in found if cell.model != "base"):
        colour, marker = style(model)
        full = model in ("LoRA", "QLoRA")
        if full and study != "steps":
            lines.append(Line2D([], [], color=colour, label=f"{model} on the full model"))
        elif study != "recovery":
            lines.append(Line2D([], [], color=colour, marker=marker, label=model))
    if study == "recovery":
        for _, colour, marker, label in CORNERS.values():
            lines.append(Line2D([], [], color=colour, marker=marker, ls="", label=label))

    def grey(label: str, line: str, marker: str = "o", fill: str = "grey") -> None:
        lines.append(
            Line2D([], [], color="grey", ls=line, marker=marker, mfc=fill, lw=1.2, label=label)
        )

    if any(cell.rate == "best" for cell in found):
        grey("shared rate", "-")
        grey("own best rate", "--", fill="white")
    if any(cell.inference == "untrained" for cell in found):
        grey("small model, not fine-tuned", ":", "x")
    return lines
