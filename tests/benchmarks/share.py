"""Share of full LoRA's gain kept: Rand and Stru at 0.65, with and without alignment, three seeds.

`python -m tests.benchmarks.share [--seeds 0 1 2]`: a pipeline a cell, on the shared store; cells
that results.jsonl has already are not run again.
"""

import argparse
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

from tests.benchmarks import RESULTS, keep

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run the missing cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = [json.loads(line) for line in lines]
    for seed, method, steps in product(parser.parse_args().seeds, ("stru", "rand"), (20, 0)):
        cell = {"method": method, "ratio": 0.65, "align_steps": steps, "seed": seed}
        if any(cell.items() <= line.items() for line in known):
            continue
        changes = [f"prune.method={method}", "prune.ratio=0.65", f"align.steps={steps}"]
        changes += [f"{part}.seed={seed}" for part in ("prune", "align", "sft")]
        done = subprocess.run(
            [sys.executable, ROOT / "pipelines" / "full.py", "small", "nf4=false", *changes],
            capture_output=True,
            text=True,
            check=True,
        )
        report = Path(re.search(r"report +(\S+)", done.stdout)[1])  # type: ignore[index]
        rows = {row["label"].rpartition(", ")[2]: row for row in _table(report)}
        keep(
            "share",
            **cell,
            base_loss=round(rows["base"]["loss"], 4),
            lora_loss=round(rows["LoRA"]["loss"], 4),
            small_loss=round(rows["small"]["loss"], 4),
            large_loss=round(rows["large"]["loss"], 4),
            share=round(rows["large"]["share"], 3),
            out_of_domain_perplexity=round(rows["large"]["out_of_domain_perplexity"], 2),
        )


def _table(report: Path) -> list[dict]:
    return list(json.loads((report.parent / "table.json").read_text()))


if __name__ == "__main__":
    main()
