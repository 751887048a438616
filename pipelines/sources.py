"""Sources of rows: parquet, JSON lines or plain text; local, `s3://` or `hf://`, read by fsspec.

Endpoints and credentials come from the usual variables (AWS_ENDPOINT_URL, HF_ENDPOINT, ...). In
plain text, documents are separated by empty lines. `.gz`, `.bz2` and `.xz` are read as they are.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loram.errors import refuse
from loram.formats import detect, to_messages
from loram.packing import scatter
from pipelines.digest import file_digest

KINDS = (".parquet", ".jsonl", ".json", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz")
PEEK = 1000  # rows of each source that are looked at before compute starts
READ = 256  # parquet rows decoded at a time

Line = tuple[int, dict[str, Any] | None, str]  # row or line number, the row, or why it is none


@dataclass(frozen=True)
class SourceSpec:
    """Where rows are and how to take them.

    path: file, directory or glob. weight: relative to the other sources'. text: column of corpus
    text. share: of the bytes, for a corpus too large to be read whole: so many of its files, chosen
    by seed, are read that this is not exceeded (but at least one).
    """

    path: str
    weight: float = 1.0
    text: str = "text"
    share: float = 1.0


def files(path: str, share: float, seed: int) -> list[str]:
    """The files of a source in a fixed order, as URLs.

    Raises:
        FileNotFoundError: there are none of a known kind.
    """
    fs, inner = _filesystem(path)
    if any(mark in inner for mark in "*?["):
        found = fs.glob(inner, detail=True)
    elif fs.isdir(inner):
        found = {n: info for n, info in fs.find(inner, detail=True).items() if _kind(n) in KINDS}
    elif fs.exists(inner):
        found = {inner: fs.info(inner)}
    else:
        found = {}
    names = sorted(name for name, info in found.items() if info["type"] == "file")
    if not names:
        raise FileNotFoundError(path)
    if share < 1:
        limit, used = share * sum(found[n]["size"] for n in names), 0
        chosen: list[str] = []
        for index in np.argsort(scatter(np.arange(len(names)), seed)):
            used += found[names[index]]["size"]
            if used > limit and chosen:
                break
            chosen.append(names[index])
        names = sorted(chosen)
    return [fs.unstrip_protocol(name) for name in names]


def lines(url: str, columns: list[str] | None = None) -> Iterator[Line]:
    """Every row of a file in bounded memory; a malformed one with its reason instead.

    Args:
        columns: of parquet, the only ones to decode.
    """
    fs, inner = _filesystem(url)
    kind = _kind(inner)
    if kind == ".parquet":
        with fs.open(inner, "rb") as file:
            number = 0
            for batch in pq.ParquetFile(file).iter_batches(READ, columns=columns):
                for row in batch.to_pylist():
                    yield number, row, ""
                    number += 1
        return
    with fs.open(inner, "rb", compression="infer") as file:
        yield from _documents(file) if kind == ".txt" else _json_rows(file)


def peek(spec: SourceSpec, setting: str, *, chat: bool) -> list[Any]:
    """Look at the names, and at the first 1,000 rows of the first file.

    Args:
        setting: the recipe key that names the source.
        chat: rows must be instructions; else the text column must hold text.

    Returns: the good ones of those rows: messages if `chat`, else texts.

    Raises:
        UserError: missing, empty, truncated, not text, no such column, or not one good row.
    """
    where = f"{setting} {spec.path}"
    if not 0 < spec.weight < float("inf"):
        refuse(f"{where} weight", spec.weight, "a number above 0")
    if not 0 < spec.share <= 1:
        refuse(f"{where} share", spec.share, "a number in (0, 1]")
    try:
        first = files(spec.path, spec.share, 0)[0]
    except FileNotFoundError:
        refuse(setting, f"nothing at {spec.path}", f"files of {', '.join(KINDS)}")
    except (OSError, ValueError, ImportError) as error:
        refuse(setting, f"{spec.path}, out of reach ({_short(error)})", "a readable source")
    if _kind(first) not in KINDS:
        refuse(
            setting, first, f"files of {', '.join(KINDS)}, or those with {', '.join(COMPRESSED)}"
        )
    try:
        found = list(islice(lines(first), PEEK))
    except (OSError, EOFError, pa.ArrowException) as error:
        refuse(setting, f"{first}, damaged ({_short(error)})", "a whole file of its kind")
    if not found:
        refuse(setting, f"{first}, empty", "a file with rows")
    rows = [row for _, row, _ in found if row is not None]
    if not rows:
        refuse(setting, f"{first} with no good row ({found[0][2]})", "JSON objects or UTF-8 text")
    columns = sorted({name for row in rows for name in row})
    if not chat:
        if spec.text not in columns:
            accepted = f"the column {spec.text!r}, or another one named by the source's `text`"
            refuse(setting, f"{first} with columns {', '.join(columns)}", accepted)
        texts = [row[spec.text] for row in rows if is_text(row.get(spec.text))]
        if not texts:
            refuse(setting, f"{first} without text in {spec.text!r}", "rows with text")
        return texts
    form, good, reason = detect(columns, f"{setting} {first}"), [], ""
    for row in rows:
        try:
            good.append(to_messages(row, form))
        except ValueError as error:
            reason = str(error)
    if not good:
        refuse(setting, f"{first} with no token to train on ({reason})", "rows with an answer")
    return good


def is_text(value: object) -> bool:
    """Whether a cell holds text to train on."""
    return isinstance(value, str) and bool(value.strip())


def digest(spec: SourceSpec, cache: Path) -> str:
    """Names the content: of local files by their bytes, of remote ones by their store's word.

    Args:
        cache: directory of remembered digests of local files.
    """
    lines_ = []
    for url in files(spec.path, 1.0, 0):
        fs, inner = _filesystem(url)
        if "file" in fs.protocol:
            content = file_digest(Path(inner), cache)
        else:
            info = fs.info(inner)
            content = str(info.get("blob_id") or info.get("ETag") or info.get("etag"))
        lines_.append(f"{inner.rpartition('/')[2]} {content}")
    return hashlib.sha256("\n".join(lines_).encode()).hexdigest()


@lru_cache(maxsize=64)
def _filesystem(path: str) -> tuple[Any, str]:
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def _kind(name: str) -> str:
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _json_rows(file: Any) -> Iterator[Line]:
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except UnicodeDecodeError:
            yield number, None, "not UTF-8"
        except ValueError as error:
            yield number, None, f"not JSON: {error}"
        else:
            good = isinstance(row, dict)
            yield number, row if good else None, "" if good else "no JSON object"


def _documents(file: Any) -> Iterator[Line]:
    start, parts = 0, list[bytes]()
    for number, raw in enumerate(file, 1):
        if raw.strip():
            start = start if parts else number
            parts.append(raw)
        elif parts:
            yield _document(start, parts)
            parts = []
    if parts:
        yield _document(start, parts)


def _document(start: int, parts: list[bytes]) -> Line:
    try:
        return start, {"text": b"".join(parts).decode().strip("\n")}, ""
    except UnicodeDecodeError:
        return start, None, "not UTF-8"


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
