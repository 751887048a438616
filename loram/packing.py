"""Documents -> rows of one length -> parquet, and back as batches in a fixed order.

Packed data is a directory of part-00000.parquet, ... and packed.json. Columns: row (int64, 0 to
n - 1 in order) and input_ids, labels, position_ids (int32[seq_len]). `position_ids` start again
at 0 at every document, and at the padding, which is one more document without labels. Given these
and no attention mask and no KV cache (`use_cache=False`), transformers lets every token attend to
its own document only.
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loram.data import IGNORED, Document

if TYPE_CHECKING:
    import torch

GROUP = 64  # rows in a row group, the least that a random read decodes
PART = 64 * GROUP  # rows in a file
ARRAYS = ("input_ids", "labels", "position_ids")

Row = list[Document]  # what one packed row holds, in order


def cut(documents: Iterable[Document], seq_len: int) -> Iterator[Row]:
    """Documents one after another, cut into rows of exactly `seq_len` tokens; for a corpus.

    The incomplete last row is left out, unless it is the only one: there is no padding otherwise.
    """
    row: Row = []
    free, first = seq_len, True
    for ids, trained, truncated in documents:
        while len(ids):
            row.append(Document(ids[:free], trained[:free], truncated))
            ids, trained, free = ids[free:], trained[free:], free - len(row[-1].ids)
            if not free:
                yield row
                row, free, first = [], seq_len, False
    if row and first:
        yield row


def best_fit(documents: Iterable[Document], seq_len: int, open_rows: int = 1024) -> Iterator[Row]:
    """Whole documents into rows of at most `seq_len` tokens; for conversations.

    Of every `open_rows` documents the longest goes first, into the open row that it fills best.
    Where none has room and `open_rows` are open, the fullest is closed: memory does not grow with
    the number of documents.

    Args:
        documents: each of at most `seq_len` tokens.
    """
    rows: list[tuple[int, int, Row]] = []  # (free tokens, number, documents), fullest first
    stream, number = iter(documents), 0
    while window := list(itertools.islice(stream, open_rows)):
        for document in sorted(window, key=lambda one: -len(one.ids)):
            length = len(document.ids)
            place = bisect.bisect_left(rows, (length, -1))
            if place < len(rows):
                free, opened, row = rows.pop(place)
            else:
                free, opened, row, number = seq_len, number, [], number + 1
                if len(rows) == open_rows:
                    yield rows.pop(0)[2]
            row.append(document)
            if free == length:
                yield row
            else:
                bisect.insort(rows, (free - length, opened, row))
    for _, _, row in sorted(rows, key=lambda entry: entry[1]):
        yield row


def write_packed(
    out: Path, rows: Iterable[Row], *, seq_len: int, pad_id: int, rejected: int = 0
) -> dict[str, int | float]:
    """Write packed data into `out`, which is made; equal rows give equal bytes.

    Args:
        rows: of `cut` or `best_fit`, one or more; one row group is held in memory.
        pad_id: fills a row's end.
        rejected: malformed source rows, to be recorded.

    Returns:
        What packed.json holds: rows, seq_len, tokens (without padding), trained_tokens, documents
        (a document cut into two rows counts twice), padding (share of all positions), truncated,
        rejected.
    """
    out.mkdir(parents=True, exist_ok=True)
    _open.cache_clear()  # of what was there before
    vector = pa.list_(pa.int32(), seq_len)
    schema = pa.schema([("row", pa.int64()), *((name, vector) for name in ARRAYS)])
    count = dict.fromkeys(("rows", "tokens", "trained_tokens", "documents", "truncated"), 0)
    writer: pq.ParquetWriter | None = None
    stream = iter(rows)
    while group := list(itertools.islice(stream, GROUP)):
        arrays = {name: np.zeros((len(group), seq_len), np.int32) for name in ARRAYS}
        for index, row in enumerate(group):
            ids, labels, position_ids = (arrays[name][index] for name in ARRAYS)
            used = _fill(row, ids, labels, position_ids, pad_id)
            count["tokens"] += used
            count["trained_tokens"] += int((labels != IGNORED).sum())
            count["documents"] += len(row)
            count["truncated"] += sum(document.truncated for document in row)
        if count["rows"] % PART == 0:
            if writer:
                writer.close()
            name = f"part-{count['rows'] // PART:05d}.parquet"
            writer = pq.ParquetWriter(out / name, schema, compression="zstd", use_dictionary=False)
        assert writer
        numbers = np.arange(count["rows"], count["rows"] + len(group))
        columns = [
            pa.FixedSizeListArray.from_arrays(a.ravel(), type=vector) for a in arrays.values()
        ]
        writer.write_table(pa.Table.from_arrays([pa.array(numbers), *columns], schema=schema))
        count["rows"] += len(group)
    if writer:
        writer.close()
    padding = 1 - count["tokens"] / max(count["rows"] * seq_len, 1)
    info = count | {"seq_len": seq_len, "padding": padding, "rejected": rejected}
    (out / "packed.json").write_text(json.dumps(info, indent=1) + "\n")
    return info


@dataclass(frozen=True)
class Packed:
    """A directory that `write_packed` wrote, read row by row; cheap to make and to send around."""

    path: Path

    @cached_property
    def info(self) -> dict[str, Any]:
        """packed.json."""
        return dict(json.loads((self.path / "packed.json").read_text()))

    @property
    def rows(self) -> int:
        """Number of packed rows."""
        return int(self.info["rows"])

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return int(self.info["seq_len"])

    def fetch(self, row_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The rows asked for, in the order asked for.

        Args:
            row_ids: int[b], each in [0, rows); may repeat.

        Returns:
            row int64[b]; input_ids, labels, position_ids int32[b, seq_len].

        Raises:
            IndexError: a row that is not there.
        """
        row_ids = np.asarray(row_ids, np.int64)
        if len(row_ids) and (row_ids.min() < 0 or row_ids.max() >= self.rows):
            raise IndexError(f"rows {row_ids.min()} to {row_ids.max()} of {self.rows}")
        found = {name: np.empty((len(row_ids), self.seq_len), np.int32) for name in ARRAYS}
        for group in np.unique(row_ids // GROUP):
            file = _open(self.path / f"part-{group * GROUP // PART:05d}.parquet")
            table = file.read_row_group(int(group % (PART // GROUP)), use_threads=False)
            here = np.flatnonzero(row_ids // GROUP == group)
            for name in ARRAYS:
                values = table[name].combine_chunks().flatten().to_numpy()
                found[name][here] = values.reshape(-1, self.seq_len)[row_ids[here] % GROUP]
        return {"row": row_ids, **found}


def scatter(index: np.ndarray, *salt: int) -> np.ndarray:
    """A well-mixed uint64 for each index and these salts: sorting by it shuffles.

    Unlike a random generator's, these numbers are the same in every version of every library, and
    do not depend on how many are drawn. The mixing is splitmix64's (Steele et al., 2014).
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for number in (*(np.array([s % 2**64], np.uint64) for s in salt), index.astype(np.uint64)):
            state = (state ^ number) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def order(rows: int, total: int, seed: int) -> np.ndarray:
    """The row to read at each place, int64[total]: every row once an epoch, a new order each.

    A shorter total gives the start of a longer one.
    """
    epochs = [
        np.argsort(scatter(np.arange(rows), seed, epoch), kind="stable")
        for epoch in range(-(-total // rows))
    ]
    return np.concatenate([*epochs, np.empty(0, np.int64)])[:total].astype(np.int64)


def batches(
    packed: Packed, ids: Sequence[int] | np.ndarray, size: int
) -> "Iterator[dict[str, torch.Tensor]]":
    """The rows `ids` as batches of `size` (the last may be smaller), read one at a time.

    Yields:
        row [b]; input_ids, labels, position_ids [b, seq_len]; all torch.int64.
    """
    import torch  # a process that only packs rows does without

    for start in range(0, len(ids), size):
        batch = packed.fetch(ids[start : start + size])
        yield {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


def _fill(
    row: Row, ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray, pad_id: int
) -> int:
    """Write the documents and the padding into one row's arrays; returns the tokens used."""
    ids[:], labels[:], start = pad_id, IGNORED, 0
    for document in row:
        end = start + len(document.ids)
        ids[start:end] = document.ids
        labels[start:end] = np.where(document.trained, document.ids, IGNORED)
        labels[start] = IGNORED  # predicted from nothing, or from another document
        position_ids[start:end] = np.arange(end - start)
        start = end
    position_ids[start:] = np.arange(len(ids) - start)
    return start


@lru_cache(maxsize=32)
def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path)
