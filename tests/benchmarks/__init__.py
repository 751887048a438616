"""Measurements, one command each; every result is printed and kept as a line of results.jsonl."""

import datetime
import json
import platform
import shlex
import sys
from pathlib import Path

from torch import cuda

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.jsonl"
PICTURES = Path(__file__).parent / "pictures"


def keep(name: str, **values: object) -> None:
    """Print a result and append it to results.jsonl, with the command, the date and the machine."""
    machine = [platform.machine(), f"Python {platform.python_version()}"]
    machine += [cuda.get_device_name()] if cuda.is_available() else []
    line = {
        "benchmark": name,
        **values,
        "command": shlex.join(
            ["python", "-m", f"tests.benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "date": datetime.date.today().isoformat(),
        "machine": ", ".join(machine),
    }
    text = json.dumps(line)
    print(text, flush=True)
    with RESULTS.open("a") as file:
        file.write(text + "\n")


def kept(name: str, **cell: object) -> list[dict]:
    """The lines of this benchmark in results.jsonl that have all these values."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    wanted = {"benchmark": name, **cell}.items()
    return [found for found in map(json.loads, lines) if wanted <= found.items()]
