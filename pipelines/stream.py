"""Packed rows in a given order, read by Ray Data ahead of the training that takes them."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import Block, BlockAccessor, BlockMetadata

from loram.packing import Packed

BLOCK = 64  # rows that one task reads
AHEAD = 32 * 2**20  # bytes that are read before they are needed


def stream(packed: Packed, ids: np.ndarray, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows `ids` as batches of `size`, exactly in this order: what `packing.batches` gives.

    One task at a time reads, in a process of its own and for 0 CPUs: training holds all CPUs of a
    small cluster. At most `AHEAD` bytes wait to be taken.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(object_store_memory=AHEAD)
    source = _Rows(packed, ids)
    rows = ray.data.read_datasource(
        source, num_cpus=0, concurrency=1, override_num_blocks=max(len(source.blocks), 1)
    )
    for batch in rows.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=1):
        yield {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


class _Rows(Datasource):
    """Ray Data's own readers choose the order of the rows; here it is given."""

    def __init__(self, packed: Packed, ids: np.ndarray) -> None:
        super().__init__()
        self.packed = packed
        self.blocks = [ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK)]

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._bytes(ids) for ids in self.blocks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, self.packed, ids),
                BlockMetadata(num_rows=len(ids), size_bytes=self._bytes(ids), exec_stats=None),
            )
            for ids in self.blocks
        ]

    def _bytes(self, ids: np.ndarray) -> int:
        return len(ids) * (8 + 3 * 4 * self.packed.seq_len)


def _read(packed: Packed, ids: np.ndarray) -> Iterable[Block]:
    yield BlockAccessor.batch_to_arrow_block(packed.fetch(ids))
