"""Rows of one file, in bounded memory: parquet, JSON lines, a JSON array, or plain text.

Every row has a number, which does not depend on what else is read: the row in a parquet file or
in an array, the line (of a text's first line), each from 0.
"""

import contextlib
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loram.errors import refuse

COMPRESSED = (".gz", ".bz2", ".xz")
TEXTS = (".jsonl", ".json", ".txt")
SUFFIXES = (".parquet", *TEXTS, *(kind + packed for kind in TEXTS for packed in COMPRESSED))
LONGEST = 1 << 26  # bytes of one row
SEPARATORS = tuple(" \t\r\n,")
PIECE = 1 << 20  # bytes or characters read at once
BATCH = 256  # rows of a parquet file decoded at once
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError, pa.ArrowException)


class Row(NamedTuple):
    """A row, or the reason why it is none."""

    number: int
    values: dict[str, Any] | None
    reason: str = ""


def read_numbers(uri: str) -> Iterator[np.ndarray]:
    """The numbers of all rows, ascending, int64[n] at a time; parses as little as it can.

    Raises:
        UserError: the file is damaged.
    """
    with opened(uri) as file:
        if uri.endswith(".parquet"):
            yield np.arange(pq.ParquetFile(file).metadata.num_rows)
            return
        numbers: list[int] = []
        for number, _ in _raw(uri, file):
            numbers.append(number)
            if len(numbers) == PIECE:
                yield np.array(numbers)
                numbers = []
        yield np.array(numbers, np.int64)


def read_rows(
    uri: str, wanted: np.ndarray | None = None, columns: list[str] | None = None
) -> Iterator[Row]:
    """The rows of a file, bad ones with their reason.

    Args:
        wanted: ascending numbers of the rows to give; None: all.
        columns: columns to read of a parquet file, those that are there; None: all.

    Raises:
        UserError: the file is damaged.
    """
    with opened(uri) as file:
        if uri.endswith(".parquet"):
            yield from _parquet(file, wanted, columns)
            return
        at = 0
        for number, raw in _raw(uri, file):
            if wanted is not None:
                if at == len(wanted):
                    return
                if number != wanted[at]:
                    continue
                at += 1
            yield _parsed(number, raw, plain=kind(uri) == ".txt")


def parquet_columns(uri: str) -> list[str]:
    """The names in a parquet file's header.

    Raises:
        UserError: the file is damaged.
    """
    with opened(uri) as file:
        return list(pq.ParquetFile(file).schema_arrow.names)


@contextlib.contextmanager
def opened(uri: str) -> Iterator[BinaryIO]:
    """The file's content, unpacked; damage found while it is open is refused with its name."""
    try:
        with fsspec.open(uri, "rb", compression="infer") as file:
            yield file if uri.endswith(".parquet") else io.BufferedReader(file, PIECE)
    except DAMAGE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            found = f"{uri}, to which there is no access ({reason[0]})"
            refuse("source", found, "one that HF_TOKEN gives access to, on every node")
        refuse("source", f"{uri}, which cannot be read to its end ({reason[0]})", "a whole file")


def kind(uri: str) -> str:
    """The suffix, such as `.jsonl`, without that of compression."""
    bare = uri.removesuffix(next((packed for packed in COMPRESSED if uri.endswith(packed)), ""))
    return "." + bare.rpartition(".")[2]


def _raw(uri: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Number and content of each row: bytes, None for one that is too long, or what was parsed."""
    if kind(uri) == ".txt":
        yield from _texts(file)
    elif kind(uri) == ".json" and _is_array(file):
        yield from _array(uri, file)
    else:
        yield from ((number, line) for number, line in _lines(file) if line is None or line.strip())


def _is_array(file: BinaryIO) -> bool:
    return file.peek(PIECE).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["  # type: ignore[attr-defined]


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith(b"\n"):
            while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line
        number += 1


def _texts(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Documents of a plain text: they are separated by empty lines."""
    first, lines, size = 0, list[bytes](), 0
    for number, line in itertools.chain(_lines(file), [(-1, b"")]):
        if line is None or line.strip():
            first = first if size else number
            size += LONGEST if line is None else len(line)
            if line is not None and size < LONGEST:
                lines.append(line)
        elif size:
            yield first, b"".join(lines) if size < LONGEST else None
            lines, size = [], 0


def _array(uri: str, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array that may be larger than memory."""
    stream = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder, text, number = json.JSONDecoder(), stream.read(PIECE), 0
    at = text.index("[") + 1
    while True:
        while text[at : at + 1] in SEPARATORS:
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = stream.read(PIECE) if len(text) - at < LONGEST else ""
            if not more:
                found = f"{uri}, broken after {number} items ({error})"
                refuse("source", found, "a whole JSON array")
            text, at = text[at:] + more, 0
        else:
            yield number, item
            number += 1


def _parsed(number: int, raw: Any, plain: bool) -> Row:
    if raw is None:
        return Row(number, None, f"longer than {LONGEST} bytes")
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8-sig").strip()
            raw = {"text": raw} if plain else json.loads(raw)
        except UnicodeDecodeError as error:
            return Row(number, None, f"no UTF-8 text at byte {error.start}")
        except (ValueError, RecursionError) as error:
            return Row(number, None, f"no JSON: {error}")
    if not isinstance(raw, dict):
        return Row(number, None, f"no JSON object but {type(raw).__name__}")
    return Row(number, raw)


def _parquet(file: BinaryIO, wanted: np.ndarray | None, columns: list[str] | None) -> Iterator[Row]:
    table = pq.ParquetFile(file)
    if columns is not None:
        columns = [name for name in columns if name in table.schema_arrow.names]
    start = 0
    for group in range(table.num_row_groups):
        end = start + table.metadata.row_group(group).num_rows
        if wanted is None or _between(wanted, start, end).size:
            for batch in table.iter_batches(BATCH, [group], columns):
                numbers = np.arange(start, start + batch.num_rows)
                if wanted is not None:
                    numbers = _between(wanted, start, start + batch.num_rows)
                yield from _decoded(numbers, batch.take(pa.array(numbers - start)))
                start += batch.num_rows
        start = end


def _between(numbers: np.ndarray, start: int, end: int) -> np.ndarray:
    low, high = np.searchsorted(numbers, [start, end])
    return numbers[low:high]


def _decoded(numbers: np.ndarray, batch: pa.RecordBatch) -> list[Row]:
    try:
        return list(map(Row, numbers.tolist(), batch.to_pylist()))
    except UnicodeDecodeError as error:
        if len(numbers) == 1:
            return [Row(int(numbers[0]), None, f"no UTF-8 text at byte {error.start}")]
        return [
            row
            for n in range(len(numbers))
            for row in _decoded(numbers[n : n + 1], batch[n : n + 1])
        ]
