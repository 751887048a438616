"""The pictures of a run's report."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ALIGNMENT = ("align", "distil")


def draw_losses(results: Sequence[tuple[str, float, float | None]]) -> Figure:
    """A bar a row: its label, held-out loss in nats, and share of full LoRA's gain if known."""
    labels, losses, shares = zip(*results, strict=True)
    figure = Figure((7, 0.5 * len(labels) + 1.4), layout="constrained")
    axes = figure.subplots()
    texts = [
        f" {loss:.3f}" + ("" if share is None else f"  ({100 * share:.0f} % of the gain)")
        for loss, share in zip(losses, shares, strict=True)
    ]
    axes.bar_label(axes.barh(labels, losses, color="#4878a8"), texts, fontsize=9)
    axes.set_xlim(0, 1.4 * max(losses))
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss in domain (nats per trained token)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(curves: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss over steps, by name of the training step; alignment, on other text, stands apart."""
    panels = [
        (title, chosen)
        for title, chosen in (
            ("alignment", {n: c for n, c in curves.items() if n in ALIGNMENT}),
            ("SFT", {n: c for n, c in curves.items() if n not in ALIGNMENT}),
        )
        if chosen
    ]
    figure = Figure((4.5 * len(panels), 3.4), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, chosen) in zip(grid[0], panels, strict=True):
        for number, (name, lines) in enumerate(chosen.items()):
            for key, style in (("loss", "-"), ("held_out_loss", "o--")):
                points = [(x["step"], x[key]) for x in lines if key in x]
                if points:
                    label = name if key == "loss" else f"{name}, held out"
                    axes.plot(
                        *zip(*points, strict=True), style, color=f"C{number}", label=label, ms=4
                    )
        axes.set_title(title)
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss (nats per trained token)")
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
