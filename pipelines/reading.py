"""Files -> ranked rows -> their contents; plain functions on batches, Ray only calls them.

Each gives tables with a column `failure`: the message of a UserError, for a whole file that cannot
be used. Raised in a task, it would reach the user below a page of Ray's own words. Their processes
do without torch and transformers, which take longer to import than most files to read.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from loram.errors import UserError
from pipelines.readers import read_numbers, read_rows
from pipelines.sample import lowest, rank
from pipelines.sources import Form, content

ROWS = 64  # read at a time
CONTENTS = pa.schema(
    {"rank": pa.int64(), "content": pa.binary(), "reason": pa.string(), "failure": pa.string()}
)


def number(batch: dict[str, Any], seed: int, limits: list[int | None]) -> pa.Table:
    """One file -> its ranked rows, or what is wrong with it as `failure`."""
    source, file, uri = int(batch["source"][0]), int(batch["file"][0]), str(batch["uri"][0])
    failure, ranked = None, rank(np.zeros(1, np.int64), seed, source, file)
    try:
        ranked = lowest((rank(some, seed, source, file) for some in read_numbers(uri)), limits)
    except UserError as error:
        failure = str(error)
    columns = {name: pa.array(values) for name, values in vars(ranked).items()}
    return pa.table(columns | {"failure": pa.array([failure] * len(ranked), pa.string())})


def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """Rows of one file -> tables of CONTENTS."""
    uri, form = str(batch["uri"][0]), Form(str(batch["form"][0]), bool(batch["chat"][0]))
    ranks, numbers = (np.frombuffer(batch[name][0], np.int64) for name in ("ranks", "numbers"))
    columns = None if form.chat else [form.name]
    rows = zip(ranks.tolist(), read_rows(uri, numbers, columns), strict=True)
    try:
        while some := list(islice(rows, ROWS)):
            table = []
            for number, row in some:
                entry = {"rank": number, "content": None, "reason": None, "failure": None}
                try:
                    text = json.dumps(content(row, form), ensure_ascii=False)
                    table.append(entry | {"content": text.encode()})
                except ValueError as error:
                    table.append(entry | {"reason": str(error)})
            yield pa.Table.from_pylist(table, schema=CONTENTS)
    except UserError as error:
        yield pa.Table.from_pylist([{"rank": 0, "failure": str(error)}], schema=CONTENTS)
