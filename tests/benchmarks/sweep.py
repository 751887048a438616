"""A sweep of 2 ratios x 4 learning rates on SmolLM2-135M: what ran, and what sharing saved.

    python -m tests.benchmarks.sweep

The sweep has a home of its own, in which nothing is finished yet. Seconds are those that the steps'
records say. `startup_s`: of all trainings, rungs too, until their first step. `trials_alone_s` is
reckoned, not run: the sum over the trials of all steps that each would have made in an empty store.
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
from pipelines.graph import build
from pipelines.locate import locate
from pipelines.recipes import resolve
from pipelines.step import Step, order
from pipelines.store import Store
from tests.benchmarks import PICTURES, ROOT, keep

STEPS = 12
SHORT = [
    "nf4=false",
    f"sft.steps={STEPS}",
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
    made = [steps(trial, store) for trial in json.loads(trials.read_text())]
    mine = [store.record(step.slug) for of_one in made for step in of_one]
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
        trials_alone_s=round(sum(record["seconds"] for record in mine)),
    )


def steps(trial: dict, store: Store) -> list[Step]:
    """All that a trial alone would have made."""
    stop = trial["steps"] if trial["steps"] < STEPS else None
    values = {key: trial[key] for key in ("sft.lr", "prune.ratio")} | {"sft.stop": stop}
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    recipe = resolve("small", [*SHORT, "compare=[]", *changes])
    graph = build(recipe, *locate(recipe, store.root / "digests"))
    return order([graph.variants[0].evaluate, graph.variants[-1].evaluate])


if __name__ == "__main__":
    main()
