"""Documents put into the order of their ranks on disk, in memory that does not grow with them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from loram.data import Document

BUCKET = 4096  # ranks that are sorted at once
WAITING = 1 << 26  # bytes in memory before they are written

SCHEMA = pa.schema(
    {
        "rank": pa.int64(),
        "ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "truncated": pa.bool_(),
    }
)
NOTHING = Document(np.empty(0, np.int32), np.empty(0, bool))


def to_table(ranks: np.ndarray, documents: list[Document]) -> pa.Table:
    """A table of SCHEMA."""
    starts = np.cumsum([0, *(len(document.ids) for document in documents)]).astype(np.int32)
    ids = np.concatenate([NOTHING.ids, *(document.ids for document in documents)])
    trained = np.concatenate([NOTHING.trained, *(document.trained for document in documents)])
    columns = [
        pa.array(ranks, pa.int64()),
        pa.ListArray.from_arrays(starts, pa.array(ids)),
        pa.ListArray.from_arrays(starts, pa.array(trained)),
        pa.array([document.truncated for document in documents], pa.bool_()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def write_spool(tables: Iterable[pa.Table], directory: Path) -> None:
    """Spread tables of SCHEMA, in any order, over files of `BUCKET` ranks each."""
    directory.mkdir(parents=True)
    waiting: dict[int, list[pa.Table]] = defaultdict(list)
    size = 0
    for table in tables:
        buckets = table["rank"].to_numpy() // BUCKET
        order = np.argsort(buckets, kind="stable")
        table, buckets = table.take(order), buckets[order]
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        for start, end in pairwise([*starts, len(buckets)]):
            waiting[int(buckets[start])].append(table.slice(start, end - start))
        size += table.nbytes
        if size > WAITING:
            _flush(waiting, directory)
            size = 0
    _flush(waiting, directory)


def read_spool(directory: Path) -> Iterator[tuple[int, Document]]:
    """Each rank with its document, ascending."""
    for path in sorted(directory.iterdir()):
        with pa.OSFile(str(path)) as file:
            tables = []
            while file.tell() < file.size():
                tables.append(pa.ipc.open_stream(file).read_all())
        table = pa.concat_tables(tables).combine_chunks().sort_by("rank")
        ids, trained = (table[name].chunk(0) for name in ("ids", "trained"))
        bounds = ids.offsets.to_numpy()
        flat_ids = ids.values.to_numpy()
        flat_trained = trained.values.to_numpy(zero_copy_only=False)
        others = (table[name].to_pylist() for name in ("rank", "truncated"))
        for n, (rank, truncated) in enumerate(zip(*others, strict=True)):
            span = slice(bounds[n], bounds[n + 1])
            yield rank, Document(flat_ids[span], flat_trained[span], truncated)


def _flush(waiting: dict[int, list[pa.Table]], directory: Path) -> None:
    for bucket, tables in waiting.items():
        table = pa.concat_tables(tables).combine_chunks()
        with (
            (directory / f"{bucket:09d}.arrows").open("ab") as file,
            pa.ipc.new_stream(file, SCHEMA) as stream,
        ):
            stream.write_table(table)
    waiting.clear()
