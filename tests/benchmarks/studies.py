"""The studies of which the README has the pictures, on SmolLM2-135M, as a user types them.

    python -m tests.benchmarks.studies [recovery] [ratio]

On the shared store, so a training that another study or `gap` made is not made again; the costs are
those of its record. `pictures/` gets the picture.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time

from pipelines.assets import home
from tests.benchmarks import PICTURES, ROOT, keep

# The method as it is there.
PAPER = ["nf4=false", "compensate.rank=0", "offset.every=0", "align.steps=20"]
STUDIES = {
    "recovery": [*PAPER, "--methods", "stru", "rand", "--seeds", "0", "1", "2"],
    "ratio": [*PAPER, "--methods", "stru", "--ratios", "0.35", "0.65", "0.85"],
}
NAMES = ("loss", "perplexity", "out_of_domain_perplexity", "score")
TOLD = ("model", "inference", "ratio", "aligned")


def main() -> None:
    """Run the studies, and keep what they say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="*", default=list(STUDIES), choices=STUDIES)
    for name in parser.parse_args().studies:
        began = time.perf_counter()
        command = [sys.executable, ROOT / "tune" / "study.py", name, "small", *STUDIES[name]]
        subprocess.run(command, check=True)
        wall = time.perf_counter() - began
        reports = (home() / "store" / "reports").glob(f"study-{name}-small-*/study.json")
        newest = max(reports, key=lambda path: path.stat().st_mtime)
        PICTURES.mkdir(exist_ok=True)
        shutil.copyfile(newest.with_name(f"{name}.svg"), PICTURES / f"{name}.svg")
        found = json.loads(newest.read_text())
        keep(
            "studies",
            study=name,
            typed=STUDIES[name],
            seeds=found["seeds"],
            means=[mean(cell) for cell in found["means"]],
            costs=[{k: round(v) if isinstance(v, float) else v for k, v in cost.items()}
                   for cost in found["costs"]],
            wall_s=round(wall),
        )  # fmt: skip


def mean(cell: dict) -> dict:
    """What tells the cell from others, and the mean and deviation of each measure."""
    told = {name: cell[name] for name in TOLD if cell[name] is not None}
    spreads = {name: cell[name] for name in NAMES if cell.get(name)}
    return told | {name: [round(s["mean"], 4), round(s["sd"], 4)] for name, s in spreads.items()}


if __name__ == "__main__":
    main()
