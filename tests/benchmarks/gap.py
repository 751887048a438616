"""What each way to close the gap is worth: share of full LoRA's gain kept, a pipeline a cell.

    python -m tests.benchmarks.gap [--methods stru rand semi unst] [--ratios 0.65 0.35 0.85]
        [--ways none align ...] [--seeds 0 1 2] [--sft-steps 20] [--nf4]

The recipe `small`, in 16 bits or 4, on the shared store: base, full LoRA, scores and cuts are made
once. `none` is the method without alignment, `align` the paper's.
Cells that results.jsonl has are not run again. Where weights were changed each way is run with and
without the correction of the recovered adapter; elsewhere that does nothing. `bound` is LoRA on the
full model at the kept positions, `qlora` QLoRA on the full model.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from pipelines.graph import build
from pipelines.locate import locate
from pipelines.recipes import resolve
from pipelines.step import order
from pipelines.store import Store
from tests.benchmarks import keep, there

ROOT = Path(__file__).parents[2]
OFF, ALIGN = ["align.steps=0"], ["align.steps=20"]


def fitted(data: str, rank: int = 64, rows: int = 64) -> list[str]:
    """Compensation on these data."""
    return [f"compensate.data={data}", f"compensate.rank={rank}", f"compensate.rows={rows}"]


DISTIL, FEW = ["distil.trained=all"], ["distil.trained=stand_ins"]
WAYS = {
    "none": OFF,
    "align": ALIGN,
    "distil": ALIGN + DISTIL,
    "general": OFF + fitted("corpus"),
    "task": OFF + fitted("task"),
    "both": OFF + fitted("both"),
    "bound": [*OFF, 'compare=["lora","bound"]'],
    "qlora": [*OFF, 'compare=["lora","qlora"]'],
    "general, distil P Q norms": ALIGN + fitted("corpus") + FEW,
    "task, distil P Q norms": ALIGN + fitted("task") + FEW,
    "task, distil": ALIGN + fitted("task") + DISTIL,
    "task, align": ALIGN + fitted("task"),
    **{f"task, rank {rank}": OFF + fitted("task", rank) for rank in (8, 16, 32, 128, 576)},
    **{f"task, {rows} rows": OFF + fitted("task", rows=rows) for rows in (16, 128, 256)},
}
ROWS = {"bound": "LoRA where pruning keeps", "qlora": "QLoRA"}  # others: the last of the table
PREPARING = ("compensate", "align", "targets", "distil")


def main() -> None:
    """Run the missing cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["stru", "rand", "semi", "unst"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.65, 0.35, 0.85])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=20)
    parser.add_argument("--nf4", action="store_true")
    options = parser.parse_args()
    for cell in cells(options):
        if not there("gap", **cell):
            run(cell)


def cells(options: argparse.Namespace) -> Iterator[dict]:
    """What is asked for."""
    for seed, method in product(options.seeds, options.methods):
        sparse = method in ("semi", "unst")
        for ratio, way in product([None] if sparse else options.ratios, options.ways):
            if way == "bound" and sparse:
                continue
            aligned = "distil.trained=stand_ins" not in WAYS[way] and ALIGN[0] in WAYS[way]
            moved = (sparse or aligned or options.nf4) and way not in ROWS
            for correct in (False, True) if moved else (False,):
                cell = {"method": method, "ratio": ratio, "nf4": options.nf4, "way": way}
                yield cell | {
                    "correct": correct,
                    "sft_steps": options.sft_steps,
                    "seed": seed,
                }


def run(cell: dict) -> None:
    """One pipeline, and its line."""
    changes = [f"prune.method={cell['method']}", f"correct={json.dumps(cell['correct'])}"]
    changes += [f"prune.ratio={cell['ratio']}"] if cell["ratio"] else []
    changes += [f"sft.steps={cell['sft_steps']}", *WAYS[cell["way"]]]
    changes += [f"{part}.seed={cell['seed']}" for part in ("prune", "align", "sft")]
    changes += [f"nf4={json.dumps(cell['nf4'])}"]
    command = [sys.executable, ROOT / "pipelines" / "full.py", "small", *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{cell}\n{done.stdout}\n{done.stderr}")
    report = Path(re.search(r"report +(\S+)", done.stdout)[1])  # type: ignore[index]
    table = {row["label"]: row for row in json.loads((report.parent / "table.json").read_text())}
    rows = list(table.values())
    row = table[ROWS[cell["way"]]] if cell["way"] in ROWS else rows[-1]
    recipe, store = resolve(str(report.parent / "recipe.json"), []), Store(report.parents[2])
    graph = build(recipe, *locate(recipe, store.root / "digests"))
    steps = [step for step in order([graph.recovered]) if step.name in PREPARING]
    records = [store.record(step.slug) for step in steps]
    keep(
        "gap",
        **cell,
        base_loss=round(table["base"]["loss"], 4),
        lora_loss=round(table["LoRA"]["loss"], 4),
        loss=round(row["loss"], 4),
        small_loss=round(rows[-2]["loss"], 4),
        share=round((rows[0]["loss"] - row["loss"]) / (rows[0]["loss"] - table["LoRA"]["loss"]), 3),
        out_of_domain_perplexity=round(row["out_of_domain_perplexity"], 2),
        lora_out_of_domain_perplexity=round(table["LoRA"]["out_of_domain_perplexity"], 2),
        held_mb=round((row["bytes"] or rows[-2]["bytes"]) / 1e6, 1),
        preparing_seconds=round(sum(record["seconds"] for record in records), 1),
        preparing={r["name"]: r["metrics"] for r in records},
    )


if __name__ == "__main__":
    main()
