"""Files of JSON lines, one a training step, that go on where an interrupted training goes on."""

import json
import os
from pathlib import Path
from typing import IO, Any

from pipelines.step import Metrics


def append(file: IO[str] | None, line: dict[str, Any]) -> None:
    """Write one line; nothing where there is no file."""
    if file:
        file.write(json.dumps(line) + "\n")


def go_on(path: Path, step: int) -> IO[str]:
    """Open a file behind its lines of steps up to `step`; what came after is about to be redone."""
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        lines.append(line)
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(lines))
    os.replace(shorter, path)
    return path.open("a", buffering=1)


def summary(path: Path) -> Metrics:
    """Of a whole training, interrupted or not: tokens, trained_tokens, train_seconds (in steps),
    tokens_per_second, peak_memory_bytes."""
    with path.open() as file:
        steps = [line for line in map(json.loads, file) if "loss" in line]
    tokens, seconds = (sum(line[name] for line in steps) for name in ("tokens", "seconds"))
    return {
        "tokens": tokens,
        "trained_tokens": sum(line["trained_tokens"] for line in steps),
        "train_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": max(line["peak_memory"] for line in steps),
    }
