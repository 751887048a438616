"""What each way to close the gap is worth: share of full LoRA's gain kept, a recipe a cell.

    python -m tests.benchmarks.gap [--methods stru rand semi unst] [--ratios 0.65 0.35 0.85]
        [--ways none align ...] [--seeds 0 1 2] [--sft-steps 20] [--nf4] [--gpu]

The recipe `small`, in 16 bits or 4, on the shared store: base, full LoRA, scores and cuts are made
once; while a step of one cell starts, one of another computes. `none` is the method without
alignment, `align` the paper's. Cells that results.jsonl has are not run again. `bound` is LoRA on
the full model at the kept positions, `qlora` QLoRA on it. Prints the README's table and draws its
picture.
"""

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

from loram.model import read_config
from loram.plan import size
from pipelines import results
from pipelines.assets import home
from pipelines.cluster import start_ray
from pipelines.execute import execute
from pipelines.graph import build
from pipelines.launch import ray_launch
from pipelines.locate import locate
from pipelines.recipes import asset, resolve
from pipelines.step import topological_order
from pipelines.store import Store
from tests.benchmarks import PICTURES, keep, kept
from tests.benchmarks.gap_table import picture, table
from tune.trainings import seeded

OFF, ALIGN = ["align.steps=0"], ["align.steps=20"]


def fitted(data: str, rank: int = 64, rows: int = 64) -> list[str]:
    """Compensation on these data."""
    return [f"compensate.data={data}", f"compensate.rank={rank}", f"compensate.rows={rows}"]


DISTIL = ["distil.top=32"]
# Before the changes of a way, whatever the recipe has.
NOTHING = [
    "compensate.rank=0",
    "compensate.gradients=false",
    "distil.top=0",
    "offset.every=0",
    "offset.parts=1",
]
WAYS = {
    "none": OFF,
    "align": ALIGN,
    "distil": ALIGN + DISTIL,
    "general": OFF + fitted("corpus"),
    "task": OFF + fitted("task"),
    "both": OFF + fitted("both"),
    "bound": [*OFF, 'compare=["lora","bound"]'],
    "qlora": [*OFF, 'compare=["lora","qlora"]'],
    "task, distil": ALIGN + fitted("task") + DISTIL,
    "task, align": ALIGN + fitted("task"),
    **{f"task, rank {rank}": OFF + fitted("task", rank) for rank in (8, 16, 32, 128, 576)},
    **{f"task, {rows} rows": OFF + fitted("task", rows=rows) for rows in (16, 32, 128, 256)},
}
WAYS |= {
    f"{way}, offsets {n}": [*WAYS[way], f"offset.every={30 // n}"]
    for way in ("none", "general", "task")
    for n in (1, 3, 6, 15, 30)
}
WAYS |= {
    f"{way}, offsets 30, {n} parts": [*WAYS[f"{way}, offsets 30"], f"offset.parts={n}"]
    for way in ("none", "general", "task")
    for n in (2, 5, 10)
}
WAYS |= {
    f"task, rank {rank}, offsets 30, 2 parts": [
        *WAYS[f"task, rank {rank}"],
        "offset.every=1",
        "offset.parts=2",
    ]
    for rank in (16, 32, 128, 576)
}
WAYS |= {
    f"task, {rows} rows, offsets 30, 2 parts": [
        *fitted("task", rows=rows),
        *OFF,
        "offset.every=1",
        "offset.parts=2",
    ]
    for rows in (16, 32, 128, 256)
}
# Stand-ins fitted on gradients, beside the same fitted on values.
WAYS |= {
    way.replace("task", "task, gradients").replace("general", "general, gradients"): [
        *changes,
        "compensate.gradients=true",
    ]
    for way, changes in WAYS.items()
    if way.startswith(("task", "general")) and "offsets 30" in way
}
# The corpus is of conversations, also for scores; those are the rows out of domain, and others.
TALKS = [f'corpus.sources=[{{"path": "{asset("alpaca.jsonl")}"}}]', "corpus.rows=300"]
WAYS["general, talks"] = [*WAYS["general"], *TALKS]
# What is run unless it is said; the last is the recipe's own.
DEFAULT = ["none", "align", "distil", "general", "task", "both", "bound"]
DEFAULT += ["task, gradients, offsets 30, 2 parts"]
# Of these ways another row of the table than the last.
ROWS = {"bound": "LoRA where pruning keeps", "qlora": "QLoRA"}
PREPARING = ("compensate", "align", "targets", "distil", "offsets")


def main() -> None:
    """Run the missing cells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["stru", "rand", "semi", "unst"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.65, 0.35, 0.85])
    parser.add_argument("--ways", nargs="+", default=DEFAULT, choices=WAYS, metavar="WAY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sft-steps", type=int, default=20)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="train and evaluate on GPUs")
    options = parser.parse_args()
    missing = [cell for cell in cells(options) if not kept("gap", **cell)]
    if missing:
        start_ray()
    with ThreadPoolExecutor(os.cpu_count()) as side_by_side:
        list(side_by_side.map(run, missing))
    chosen = {"nf4": options.nf4, "sft_steps": options.sft_steps}
    print(table(WAYS, **chosen))
    if chosen == {"nf4": False, "sft_steps": 20}:
        picture(**chosen).savefig(PICTURES / "gap.svg")


def cells(options: argparse.Namespace) -> Iterator[dict]:
    """What is asked for."""
    for seed, method in product(options.seeds, options.methods):
        sparse = method in ("semi", "unst")
        for ratio, way in product([None] if sparse else options.ratios, options.ways):
            if way == "bound" and sparse:
                continue
            cell = {"method": method, "ratio": ratio, "nf4": options.nf4, "way": way}
            yield cell | {"sft_steps": options.sft_steps, "seed": seed, "gpu": options.gpu}


def run(cell: dict) -> None:
    """What is missing of the cell's steps, and its line."""
    changes = [f"prune.method={cell['method']}"]
    changes += [f"prune.ratio={cell['ratio']}"] if cell["ratio"] else []
    changes += [f"nf4={json.dumps(cell['nf4'])}", f"sft.steps={cell['sft_steps']}"]
    changes += [*NOTHING, *WAYS[cell["way"]]]
    # Two cells on a core each are through sooner than one on two.
    changes += ["place.gpus_per_worker=1" if cell["gpu"] else "place.cpus_per_worker=1"]
    recipe = resolve("small", changes)
    recipe = seeded(recipe, cell["seed"], recipe.sft.lr)  # as a study, which uses what this made
    store = Store(home() / "store")
    graph = build(recipe, *locate(recipe, store.root / "digests"))
    base, lora, *others = graph.variants
    wanted = next((v for v in others if v.label == ROWS.get(cell["way"])), others[-1])
    graph = replace(graph, variants=(base, lora, wanted))
    targets = [variant.evaluate for variant in graph.variants] + [graph.recovered]
    execute(targets, store, ray_launch, recipe.place, lambda event: None)
    rows = results.rows(graph, store, size(read_config(recipe.model)))
    steps = [step for step in topological_order([graph.recovered]) if step.name in PREPARING]
    records = [store.record(step.slug) for step in steps]
    keep(
        "gap",
        **cell,
        base_loss=round(rows[0].loss, 4),
        lora_loss=round(rows[1].loss, 4),
        loss=round(rows[2].loss, 4),
        share=None if rows[2].share is None else round(rows[2].share, 3),
        out_of_domain_perplexity=round(rows[2].out_of_domain_perplexity, 2),
        lora_out_of_domain_perplexity=round(rows[1].out_of_domain_perplexity, 2),
        held_mb=round(rows[2].bytes / 1e6, 1),
        peak_mb=round(rows[2].peak_memory_bytes / 1e6),
        lora_peak_mb=round(rows[1].peak_memory_bytes / 1e6),
        preparing_seconds=round(sum(record["seconds"] for record in records), 1),
        preparing=[{"step": r["name"], "seconds": r["seconds"]} | r["metrics"] for r in records],
    )


if __name__ == "__main__":
    main()
