"""What each way to close the gap costs before training, one step after the other.

    python -m tests.benchmarks.costs [--method stru] [--ratio 0.65]

For an idle machine. The steps run in a store of their own, what they need first. `seconds` are
without the start of processes and with a training's own evaluations, `tokens` those that are
computed on, `bytes` what training reads beside the model; `stand_in_parameters` it holds, frozen.
"""

import argparse
import tempfile
from pathlib import Path

from pipelines.execute import execute
from pipelines.graph import build
from pipelines.launch import ray_launch, start_ray
from pipelines.locate import locate
from pipelines.recipes import resolve
from pipelines.step import order
from pipelines.store import Store
from tests.benchmarks import keep
from tests.benchmarks.gap import NOTHING, WAYS

STEPS = {
    "align": ["align"],
    "distil": ["targets", "distil"],
    "task": ["compensate"],
    "task, gradients, offsets 30": ["compensate", "offsets"],
}
TOLD = ("tokens", "peak_memory_bytes", "bytes", "stand_in_parameters")


def main() -> None:
    """A line a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("stru", "rand"), default="stru")
    parser.add_argument("--ratio", type=float, default=0.65)
    options = parser.parse_args()
    start_ray()
    with tempfile.TemporaryDirectory() as name:
        for way, names in STEPS.items():
            changes = [f"prune.method={options.method}", f"prune.ratio={options.ratio}"]
            recipe = resolve("small", [*changes, *NOTHING, *WAYS[way]])
            store = Store(Path(name) / "store")
            graph = build(recipe, *locate(recipe, store.root / "digests"))
            steps = {step.name: step for step in order([graph.recovered])}
            last = steps[names[-1]]
            execute([last], store, ray_launch, recipe.place, lambda event: None, at_once=1)
            for step in names:
                record = store.record(steps[step].slug)
                metrics = record["metrics"]
                seconds = record["seconds"] - metrics.get("startup_seconds", 0)
                told = {key: metrics[key] for key in TOLD if key in metrics}
                keep("costs", **vars(options), way=way, step=step, seconds=round(seconds), **told)


if __name__ == "__main__":
    main()
