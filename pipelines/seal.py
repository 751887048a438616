"""The record of a finished step, by which its directory counts as complete and unharmed."""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.digest import file_digest, read_digest

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


def flaw(entry: Path, key: str, digests: Path) -> str:
    """Why a sealed directory is not whole, or not the step's with this key; empty if it is.

    Args:
        digests: where checksums are remembered.

    Raises:
        OSError: it is not there, or something in it cannot be read.
    """
    try:
        record = json.loads((entry / RECORD).read_text())
        if record["key"] != key:
            return f"{RECORD} is for another step, {record['key']}"
        if odd := sorted(set(_files(entry)).symmetric_difference({RECORD, *record["files"]})):
            return f"{odd[0]} is missing or was added"
        for name, was in record["files"].items():
            if (entry / name).stat().st_size != was["size"]:
                return f"{name} has not the size of its record"
            if file_digest(entry / name, digests) != was["sha256"]:
                return f"{name} has not the checksum of its record"
    except (ValueError, KeyError, TypeError) as error:
        return f"unreadable: {error!r}"
    return ""


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, outlast a crash of the machine."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _files(entry: Path) -> Iterator[str]:
    """Relative paths of all files; unlike `rglob` it passes over no directory without a word."""

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(entry, onerror=fail):
        for name in names:
            yield str((Path(parent) / name).relative_to(entry))


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
