"""The picture of the study `cost`."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tune.draw import seeds
from tune.points import SEARCH, STAGES, Cost, Seen, spread

COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#cc79a7", "#999999", "#d55e00")
ORDER = [*dict.fromkeys(STAGES.values()), SEARCH]
STACKED: tuple[tuple[Callable[[Cost], float | None], str], ...] = (
    (lambda cost: cost.tokens and cost.tokens / 1e3, "tokens (thousands)"),
    (lambda cost: cost.seconds, "time (s)"),
)


def draw_costs(seen: Seen) -> Figure:
    """Tokens and seconds, stacked by stage, and the peak memory of each stage; a row an arm."""
    arms = list(dict.fromkeys(cost.arm for cost in seen.costs))
    stages = [stage for stage in ORDER if any(cost.stage == stage for cost in seen.costs)]
    size = (12, 0.5 * len(arms) + 2.2)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (value, label) in zip(grid, STACKED, strict=False):
        _stack(axes, seen.costs, arms, stages, value)
        axes.set_xlabel(label)
    for row, arm in enumerate(arms):
        for number, stage in enumerate(stages):
            mine = [c.peak_memory_bytes for c in seen.costs if (c.arm, c.stage) == (arm, stage)]
            if found := spread(peak and peak / 1e9 for peak in mine):
                # One below the other: stages with the same peak are all seen.
                y = row + 0.5 * ((number + 0.5) / len(stages) - 0.5)
                bar = found.sd if found.n > 1 else None
                axes = grid[2]
                axes.errorbar(found.mean, y, xerr=bar, fmt=_mark(stage), **_dot(stage))
    grid[2].set_xlabel("peak memory of a process (GB)")
    grid[0].set_yticks(range(len(arms)), arms)
    grid[0].invert_yaxis()
    for axes in grid:
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    handles = [Rectangle((0, 0), 1, 1, label=stage, **_fill(stage)) for stage in stages]
    columns = len(stages)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    figure.suptitle(seeds(seen), fontsize=9)
    return figure


def _stack(
    axes: Axes,
    costs: list[Cost],
    arms: list[str],
    stages: list[str],
    value: Callable[[Cost], float | None],
) -> None:
    """A bar an arm of the stages' means, with the deviation of the sums over seeds at its end."""
    for row, arm in enumerate(arms):
        left = 0.0
        for stage in stages:
            found = spread(value(c) for c in costs if (c.arm, c.stage) == (arm, stage))
            if found:
                axes.barh(row, found.mean, left=left, height=0.6, **_fill(stage))
                left += found.mean
        chosen = sorted({c.seed for c in costs if c.arm == arm})
        sums = [
            sum(value(c) or 0.0 for c in costs if (c.arm, c.seed) == (arm, seed)) for seed in chosen
        ]
        if len(sums) > 1 and (total := spread(sums)):
            axes.errorbar(total.mean, row, xerr=total.sd, color="black", capsize=3, lw=1.2)


def _colour(stage: str) -> str:
    return COLOURS[ORDER.index("SFT" if stage == SEARCH else stage)]


def _fill(stage: str) -> dict:
    hatch = {"hatch": "////"} if stage == SEARCH else {}
    return {"facecolor": _colour(stage), "edgecolor": "white", "lw": 0.5} | hatch


def _mark(stage: str) -> str:
    return "D" if stage == SEARCH else "o"


def _dot(stage: str) -> dict:
    return {"color": _colour(stage), "mec": "#444444", "mew": 0.5, "ms": 6}
