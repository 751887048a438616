"""The record of a finished step, by which its directory counts as complete and unharmed."""

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from pipelines.digest import read_digest

RECORD = "record.json"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "ray", "pyarrow")


def seal(out: Path, about: dict[str, Any]) -> None:
    """Make what is in `out` durable and write its record, last.

    The record is `about` with the checksums of all files and the versions of the libraries.
    """
    files = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        sync(path)
        about_file = {"sha256": read_digest(path), "size": path.stat().st_size}
        files[str(path.relative_to(out))] = about_file
    record = about | {"libraries": _versions(), "files": files}
    text = json.dumps(record, indent=1, allow_nan=False)
    (out / RECORD).write_text(text + "\n")
    sync(out / RECORD)
    sync(out)


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, outlast a crash of the machine."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
