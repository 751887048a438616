"""The table at the end of a run, and one self-contained page with its plots."""

import base64
import html
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pipelines.journal import redact
from pipelines.plots import draw_curves, draw_losses
from pipelines.results import LEAST_GAIN, Row

COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("model", lambda row: row.label),
    ("parameters", lambda row: _number(row.parameters, 1e6, ".1f", " M")),
    ("held", lambda row: _number(row.bytes, 1e6, ",.0f", " MB")),
    ("reduction", lambda row: _number(row.reduction, 1, ".2f", "x")),
    ("loss", lambda row: f"{row.loss:.3f}"),
    ("ppl in", lambda row: f"{row.perplexity:.2f}"),
    ("ppl out", lambda row: f"{row.out_of_domain_perplexity:.2f}"),
    ("share of gain", lambda row: _number(row.share, 0.01, ".0f", " %")),
    ("score", lambda row: _number(row.score, 0.01, ".1f", " %")),
    ("tokens/s", lambda row: _number(row.tokens_per_second, 1, ",.0f", "")),
    ("peak", lambda row: _number(row.peak_memory_bytes, 1e6, ",.0f", " MB")),
]

SCORE = "held-out problems of the domain answered with the right final number (strict match)"


def notes(rows: list[Row]) -> list[str]:
    """What a reader must know to read the table rightly."""
    lines = [
        "held: the frozen model while the adapter trains. reduction: full model in bf16 over held. "
        "loss: nats a trained token, held out, in domain. tokens/s, peak: of SFT, without padding."
    ]
    by_label = {row.label: row for row in rows}
    if "LoRA" not in by_label:
        lines.append("share of gain: not told, no LoRA on the full model was trained.")
    elif all(row.share is None for row in rows):
        gain = by_label["base"].loss - by_label["LoRA"].loss
        lines.append(
            f"share of gain: means nothing here, full LoRA gained {gain:.3f} nats over the base "
            f"and at least {LEAST_GAIN} are needed."
        )
    if by_label["base"].score is not None:
        lines.append(f"score: {SCORE}.")
    return lines


def columns(rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Those of the table; a score only where it was asked for."""
    scored = any(row.score is not None for row in rows)
    return [column for column in COLUMNS if scored or column[0] != "score"]


def table(rows: list[Row], title: str) -> Table:
    """The table for a terminal."""
    drawn = Table(title=title, caption="\n".join(notes(rows)), caption_justify="left")
    for index, (name, _) in enumerate(columns(rows)):
        drawn.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*(show(row) for _, show in columns(rows)))
    return drawn


def write(
    out: Path,
    rows: list[Row],
    curves: dict[str, list[dict[str, Any]]],
    records: list[dict[str, Any]],
    recipe: dict[str, Any],
    versions: dict[str, str],
) -> None:
    """Write `report.html`, `table.json` and the plots as SVG and PNG to the directory `out`.

    Args:
        curves: by name of the training step, its `metrics.jsonl`.
        records: of every step, in order.
        recipe: flat resolved recipe.
    """
    (out / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    pictures = {"losses": draw_losses([(row.label, row.loss, row.share) for row in rows])}
    if curves:
        pictures["curves"] = draw_curves(curves)
    images = save(out, pictures)
    head = [name for name, _ in columns(rows)]
    body = [[show(row) for _, show in columns(rows)] for row in rows]
    found = (
        html_table(head, body)
        + paragraphs(notes(rows))
        + images
        + "<h2>Steps</h2>"
        + html_table(["step", "key", "seconds", "of it start-up"], [_spent(r) for r in records])
    )
    write_page(out, f"LoRAM: {recipe['name']}", found, recipe, versions)


def _spent(record: dict[str, Any]) -> list[str]:
    """A training waits for its turn and its processes before its first optimiser step, or its
    first after a lost worker."""
    startup = record["metrics"].get("startup_seconds")
    shown = "" if startup is None else f"{startup:,.1f}"
    return [record["name"], record["key"][:12], f"{record['seconds']:,.1f}", shown]


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
table { font-size: 13px }
th, td { padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; display: block }
"""


def save(out: Path, pictures: dict[str, Figure]) -> str:
    """Write pictures as SVG and PNG to the directory `out`; their HTML."""
    images = ""
    for name, figure in pictures.items():
        figure.savefig(out / f"{name}.svg")
        figure.savefig(out / f"{name}.png", dpi=150)
        images += image(figure)
    return images


def write_page(
    out: Path, title: str, body: str, recipe: dict[str, Any], versions: dict[str, str]
) -> None:
    """Write `report.html`, which loads nothing: the body, and below it recipe and versions."""
    title = html.escape(title)
    (out / "report.html").write_text(
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}<h2>Recipe</h2>"
        + html_table(["key", "value"], [[k, redact(str(v))] for k, v in recipe.items()])
        + "<h2>Versions</h2>"
        + html_table(["library", "version"], [[k, v] for k, v in versions.items()])
    )


def paragraphs(lines: list[str]) -> str:
    """Lines of plain text."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of a self-contained page."""

    def line(cells: list[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def image(figure: Figure) -> str:
    """A picture of a self-contained page."""
    data = io.BytesIO()
    figure.savefig(data, format="svg")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/svg+xml;base64,{encoded}">'


def _number(value: float | None, unit: float, spec: str, suffix: str) -> str:
    return "-" if value is None else f"{value / unit:{spec}}{suffix}"
