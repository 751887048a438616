"""A sweep of 2 ratios x 4 learning rates on SmolLM2-135M: what ran, and what sharing saved.

    python -m tests.benchmarks.sweep

The sweep has a home of its own, in which nothing is finished yet. Seconds are those that the steps'
records say. `startup_s`: of all trainings, rungs too, until their first step. `trials_alone_s` is
reckoned, not run: the sum over the trials of all steps that each would have made in an empty store,
as long as they took here, side by side with others.
`pictures/` gets the plot of the report.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from pipelines.assets import home
from pipelines.graph import Graph, build
from pipelines.locate import locate
from pipelines.recipes import resolve
from pipelines.step import topological_order
from pipelines.store import Store
from tests.benchmarks import PICTURES, ROOT, keep
from tune.rungs import rungs, sft_of, stopped

SHORT = [
    "nf4=false",
    "compensate.rank=0",
    "offset.every=0",
    "sft.steps=12",
    "sft.eval_every=4",
    "align.steps=8",
    "align.eval_every=8",
    "evaluate.rows=40",
    "instruct.held_out=16",
    "corpus.held_out=4",
]
SWEPT = ["sft.lr=1e-5..1e-3", "prune.ratio=0.65,0.85", "--trials", "4"]


def main() -> None:
    """Sweep, then read the records."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        (where / "assets").symlink_to(home() / "assets")
        began = time.perf_counter()
        command = [sys.executable, ROOT / "tune" / "sweep.py", "small", *SHORT, *SWEPT]
        subprocess.run(command, env=os.environ | {"LORAM_HOME": str(where)}, check=True)
        wall = time.perf_counter() - began
        report(where, wall)


def report(where: Path, wall: float) -> None:
    """The line of a finished sweep."""
    store = Store(where / "store")
    records = [json.loads(f.read_text()) for f in store.root.glob("*/record.json")]
    ran = Counter(record["name"] for record in records)
    trainings = [record["metrics"] for record in records if record["name"] == "sft"]
    (trials,) = store.root.glob("reports/sweep-*/trials.json")
    PICTURES.mkdir(exist_ok=True)
    shutil.copyfile(trials.with_name("large_loss-sft-lr.svg"), PICTURES / "sweep.svg")
    told = [trial for trial in json.loads(trials.read_text()) if not trial["error"]]
    made = [alone(trial, store) for trial in told]
    mine = [record for records, _ in made for record in records]
    keep(
        "sweep",
        ratios=2,
        rates=4,
        prunings=ran["prune"],
        alignments=ran["align"],
        scorings=ran["score"],
        evaluations=ran["evaluate_large"],
        wall_s=round(wall),
        # The training of a rung includes those of the rungs before it.
        training_s=round(sum(r["metrics"]["train_seconds"] for r in mine if r["name"] == "sft")),
        startup_s=round(sum(training["startup_seconds"] for training in trainings)),
        steps_s=round(sum(record["seconds"] for record in records)),
        trials_alone_s=round(sum(r["seconds"] for r in mine) + sum(more for _, more in made)),
    )


def alone(trial: dict, store: Store) -> tuple[list[dict], float]:
    """The records of all steps that a trial alone would have made, and what these say too little:
    that of the last rung does not count the training before it."""
    values = {key: trial[key] for key in ("sft.lr", "prune.ratio")}
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    recipe = resolve("small", [*SHORT, "compare=[]", *changes])

    def graph(step: int) -> Graph:
        return build(stopped(recipe, step), *locate(recipe, store.root / "digests"))

    ended = graph(trial["steps"]).variants
    made = topological_order([ended[0].evaluate, ended[-1].evaluate])
    earlier = [step for step in rungs(recipe.sft) if step < trial["steps"]]
    before = [store.record(sft_of(graph(step)).slug)["metrics"] for step in earlier[-1:]]
    return [store.record(s.slug) for s in made], sum(m["train_seconds"] for m in before)


if __name__ == "__main__":
    main()
