"""SHA-256 of files, remembered: checking gigabytes a second time costs one `stat` a file."""

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

SETTLED_NS = 1_000_000_000  # a file younger than this may change again within one clock tick


def file_digest(path: Path, cache: Path) -> str:
    """Hex SHA-256 of the file's bytes.

    Args:
        path: a local file.
        cache: a directory (made if missing; safe to share between processes) with one small file
            for each path. A remembered digest counts while size, mtime and ctime are unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    path = path.resolve()
    note = cache / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    seen = _stamp(path)
    try:
        known = json.loads(note.read_text())
        if known["stamp"] == seen:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never seen, or a note torn by a crash: read the file
    digest = read_digest(path)
    if _stamp(path) == seen and time.time_ns() - seen[1] > SETTLED_NS:
        cache.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{uuid.uuid4().hex}")
        draft.write_text(json.dumps({"path": str(path), "stamp": seen, "sha256": digest}))
        draft.replace(note)
    return digest


def forget_absent(cache: Path) -> None:
    """Remove what is remembered of files that are no more."""
    for note in cache.glob("*"):
        try:
            absent = not Path(json.loads(note.read_text())["path"]).exists()
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written or removed
        if absent:
            note.unlink(missing_ok=True)


def read_digest(path: Path) -> str:
    """Hex SHA-256 of the file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
