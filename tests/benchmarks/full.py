"""`make full` in an empty home: its wall time, and what of it is model compute.

    python -m tests.benchmarks.full

Seconds of a step are those of its record; of a training, from its first step on, since before that
it waits for its turn and for its processes. The rest of the wall time is data and start-up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from pipelines.assets import home
from tests.benchmarks import ROOT, keep

DATA = ("corpus", "instruct", "in_domain", "out_of_domain")


def main() -> None:
    """Run it, then read the records."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        (where / "assets").symlink_to(home() / "assets")
        began = time.perf_counter()
        command = [sys.executable, ROOT / "pipelines" / "full.py"]
        subprocess.run(command, env=os.environ | {"LORAM_HOME": str(where)}, check=True)
        report(where, time.perf_counter() - began)


def report(where: Path, wall: float) -> None:
    """The line of a finished run."""
    records = [json.loads(f.read_text()) for f in (where / "store").glob("*/record.json")]
    seconds: dict[str, float] = defaultdict(float)  # of all parts of a training
    for r in records:
        seconds[r["name"]] += r["seconds"] - r["metrics"].get("startup_seconds", 0)
    computed = sum(each for name, each in seconds.items() if name not in DATA)
    (table,) = (where / "store").glob("reports/*/table.json")
    keep(
        "full",
        wall_s=round(wall),
        compute_share=round(computed / wall, 3),
        seconds={name: round(each, 1) for name, each in sorted(seconds.items())},
        rows=json.loads(table.read_text()),
    )


if __name__ == "__main__":
    main()
