"""Which rows a data step takes: exactly as many as asked for, chosen without reading them.

The rows of a source are ranked by a hash of (seed, source, file, row number) and the lowest are
taken, in the order of their ranks: a random order. The choice is the same whoever computes it, and
taking more keeps those taken. Sources are mixed so that they have their part in every stretch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loram.errors import refuse
from loram.packing import scatter
from pipelines.sources import SourceSpec
from pipelines.step import Source

MERGE = 1 << 20  # rows that may wait before the lowest are picked


@dataclass(frozen=True)
class Reading:
    """How a source is read: a `SourceSpec` with what it holds in place of its path."""

    digest: str
    weight: float
    text: str
    share: float


def readings(specs: Iterable[SourceSpec], located: Mapping[str, Source]) -> tuple[Reading, ...]:
    """The identity of sources, given by path what was found there."""
    return tuple(Reading(located[s.path].digest, s.weight, s.text, s.share) for s in specs)


@dataclass(frozen=True)
class CorpusConfig:
    """rows: documents, divided among the sources by weight. held_out: packed rows, of the first
    documents, that are not trained on."""

    sources: tuple[Reading, ...]
    rows: int
    held_out: int
    seq_len: int
    max_bad_share: float
    seed: int

    @property
    def setting(self) -> str:
        """The part of the recipe that asks for these rows."""
        return "corpus"


@dataclass(frozen=True)
class InstructConfig:
    """rows: conversations, divided among the sources by weight; None for all. held_out: how many
    of those, the first, are kept from training; as many as `rows` makes a set for evaluation alone,
    which may be of fewer rows if there are not so many."""

    sources: tuple[Reading, ...]
    rows: int | None
    held_out: int
    seq_len: int
    max_bad_share: float
    seed: int

    @property
    def setting(self) -> str:
        """The part of the recipe that asks for these rows: `evaluate` for evaluation alone."""
        return "evaluate" if self.rows == self.held_out else "instruct"


Config = CorpusConfig | InstructConfig


@dataclass(frozen=True)
class Sample:
    """Rows in an order: the source, file and number of each, and the hash that ranks it.

    key: uint64[n]; source, file, number: int64[n].
    """

    key: np.ndarray
    source: np.ndarray
    file: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def take(self, rows: np.ndarray) -> "Sample":
        """The rows at these places, or where this mask is true."""
        return Sample(self.key[rows], self.source[rows], self.file[rows], self.number[rows])


def rank(numbers: np.ndarray, seed: int, source: int, file: int) -> Sample:
    """The rows of these numbers in one file, ranked."""
    keys = scatter(numbers, seed, source, file)
    order = np.argsort(keys, kind="stable")
    same = np.ones(len(keys), np.int64)
    return Sample(keys[order], source * same, file * same, numbers[order].astype(np.int64))


def lowest(samples: Iterable[Sample], limits: Sequence[int | None]) -> Sample:
    """The lowest of all samples, by rank: of each source as many as its limit, None for all."""
    kept, waiting, size = rank(np.empty(0, np.int64), 0, 0, 0), list[Sample](), 0
    for sample in samples:
        waiting.append(sample)
        size += len(sample)
        if size > MERGE:
            kept, waiting, size = _merged([kept, *waiting], limits), [], 0
    return _merged([kept, *waiting], limits)


def mixed(sample: Sample) -> Sample:
    """The same rows, with each source spread evenly over the whole.

    By their hashes alone a source of which few rows were taken would come first.
    """
    order = np.empty(len(sample))
    for source in np.unique(sample.source):
        ours = np.flatnonzero(sample.source == source)
        order[ours] = (np.arange(len(ours)) + 0.5) / len(ours)
    return sample.take(np.lexsort((sample.source, order)))


def quotas(rows: int | None, weights: Sequence[float], setting: str) -> list[int | None]:
    """Rows of each source, by weight; they sum to `rows`. None: all rows.

    Raises:
        UserError: unequal weights without a number of rows to divide.
    """
    if rows is None:
        if len(set(weights)) > 1:
            refuse(setting, "null, all rows, of sources with unequal weights", "a number of rows")
        return [None] * len(weights)
    parts = [rows * weight / sum(weights) for weight in weights]
    whole = [math.floor(part) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda n: (whole[n] - parts[n], n))
    for n in by_rest[: rows - sum(whole)]:
        whole[n] += 1
    return list(whole)


def with_spares(quota: int | None, max_bad_share: float) -> int | None:
    """How many rows to look at, so that either `quota` good ones are among them or too many bad."""
    if quota is None or max_bad_share >= 1:
        return None
    return math.ceil(quota / (1 - max_bad_share))


def first(good: np.ndarray, sample: Sample, limits: Sequence[int | None]) -> np.ndarray:
    """Which rows of the sample are used, bool[n]: of each source the first good ones, up to its
    limit."""
    used = good.copy()
    for source, limit in enumerate(limits):
        if limit is not None:
            used[np.flatnonzero(good & (sample.source == source))[limit:]] = False
    return used


def check_bad(config: Config, path: str, good: np.ndarray, rejects: Path) -> None:
    """Refuse a source with too many malformed rows."""
    bad, share = int((~good).sum()), float(np.mean(~good))
    if share > config.max_bad_share:
        found = f"{bad} malformed of {len(good)} rows of {path} ({share:.1%}), listed in {rejects}"
        setting = "instruct" if isinstance(config, InstructConfig) else "corpus"
        refuse(f"{setting}.max_bad_share", found, f"at most {config.max_bad_share:.1%}")


def check_count(config: Config, path: str, rows: int, limit: int | None) -> None:
    """Refuse a source with fewer rows than asked of it; for evaluation alone, one with none."""
    wanted = 1 if config.setting == "evaluate" else limit or 1
    if rows < wanted:
        found = f"{limit or 'all'} rows from {path}, which has {rows} good ones"
        refuse(f"{config.setting}.rows", found, "no more than there are")


def _merged(samples: list[Sample], limits: Sequence[int | None]) -> Sample:
    names = ("key", "source", "file", "number")
    whole = Sample(*(np.concatenate([getattr(s, name) for s in samples]) for name in names))
    whole = whole.take(np.lexsort((whole.number, whole.file, whole.source, whole.key)))
    return whole.take(first(np.ones(len(whole), bool), whole, limits))
