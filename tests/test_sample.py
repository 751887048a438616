"""Exactly as many rows as asked for, the same ones whoever chooses; order on disk."""

import tracemalloc

import numpy as np
import pytest

from loram.data import Document
from loram.errors import UserError
from pipelines import spool
from pipelines.sample import Sample, first, lowest, mixed, quotas, rank, with_spares
from pipelines.spool import read_spool, to_table, write_spool


def everything(counts: dict[tuple[int, int], int]) -> list[Sample]:
    """All rows of files, given as (source, file): number of rows."""
    return [rank(np.arange(rows), 7, *where) for where, rows in counts.items()]


def rows_of(sample: Sample) -> list[tuple[int, int, int]]:
    columns = (sample.source, sample.file, sample.number)
    return list(zip(*(column.tolist() for column in columns), strict=True))


COUNTS = {(0, 0): 1000, (0, 1): 50, (1, 0): 700, (1, 1): 0}


def test_the_choice_is_exact_and_does_not_depend_on_who_makes_it(monkeypatch):
    whole = lowest(everything(COUNTS), [None, None])
    assert len(set(rows_of(whole))) == len(whole) == 1750
    chosen = lowest(everything(COUNTS), [100, 30])
    assert np.bincount(chosen.source).tolist() == [100, 30]
    assert (np.diff(chosen.key.astype(float)) >= 0).all()
    # Files in another order, each cut into pieces and picked from first: the same rows.
    pieces = [
        lowest([sample.take(np.arange(start, len(sample), 3)) for start in range(3)], [100, 30])
        for sample in reversed(everything(COUNTS))
    ]
    monkeypatch.setattr("pipelines.sample.MERGE", 64)
    assert rows_of(lowest(pieces, [100, 30])) == rows_of(chosen)
    # More rows keep those that fewer had.
    more = rows_of(lowest(everything(COUNTS), [200, 60]))
    assert set(rows_of(chosen)) < set(more)
    assert [row for row in more if row in set(rows_of(chosen))] == rows_of(chosen)


def test_the_choice_is_even():
    chosen = lowest(everything({(0, 0): 20_000, (0, 1): 20_000}), [10_000])
    assert abs((chosen.file == 0).mean() - 0.5) < 0.02
    assert abs((chosen.number < 10_000).mean() - 0.5) < 0.02
    assert abs((chosen.number[:1000] < 10_000).mean() - 0.5) < 0.06


def test_every_stretch_has_its_part_of_each_source():
    """Half of one source and a hundredth of the other are taken: the same number of rows."""
    chosen = mixed(lowest(everything({(0, 0): 400, (1, 0): 20_000}), [200, 200]))
    for start in range(0, 400, 50):
        assert chosen.source[start : start + 50].sum() == 25
    for source in (0, 1):
        keys = chosen.key[chosen.source == source]
        assert (keys == np.sort(keys)).all()
        numbers = chosen.number[chosen.source == source]
        assert abs(np.corrcoef(np.arange(200), numbers)[0, 1]) < 0.25


def test_bad_rows_are_replaced_by_the_next_good_ones():
    sample = lowest(everything(COUNTS), [110, 33])
    good = np.ones(len(sample), bool)
    good[[0, 5, 77]] = False
    used = first(good, sample, [100, 30])
    assert not used[[0, 5, 77]].any()
    assert np.bincount(sample.source[used]).tolist() == [100, 30]


def test_quotas_sum_up_and_follow_the_weights():
    assert quotas(102_400, [1.0, 1.0], "corpus.rows") == [51_200, 51_200]
    assert quotas(10, [1.0, 1.0, 1.0], "corpus.rows") == [4, 3, 3]
    assert quotas(150, [4.0, 1.0], "corpus.rows") == [120, 30]
    assert quotas(None, [2.0, 2.0], "instruct.rows") == [None, None]
    with pytest.raises(UserError, match="^instruct.rows: found null, all rows, of sources with"):
        quotas(None, [2.0, 1.0], "instruct.rows")


@pytest.mark.parametrize("quota", [1, 99, 100, 101, 12_345])
def test_spares_suffice_unless_too_many_are_bad(quota):
    looked_at = with_spares(quota, 0.01)
    assert looked_at - int(0.01 * looked_at) >= quota
    assert looked_at <= quota * 1.011 + 1
    assert with_spares(quota, 0.0) == quota
    assert with_spares(quota, 1.0) is None and with_spares(None, 0.01) is None


def documents(count: int) -> list[Document]:
    generator = np.random.default_rng(0)
    return [
        Document(
            generator.integers(0, 9, length, dtype=np.int32),
            generator.random(length) < 0.5,
            bool(length % 2),
        )
        for length in generator.integers(1, 40, count)
    ]


def test_spool_gives_back_in_order_what_came_in_any(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "BUCKET", 64)
    monkeypatch.setattr(spool, "WAITING", 5_000)
    made = documents(500)
    ranks = np.random.default_rng(1).permutation(500)
    ranks = ranks[ranks % 7 != 0]  # bad rows leave gaps
    tables = [to_table(part, [made[r] for r in part]) for part in np.array_split(ranks, 9)]
    write_spool([*tables, tables[0].slice(0, 0)], tmp_path / "spool")
    found = list(read_spool(tmp_path / "spool"))
    assert [place for place, _ in found] == sorted(ranks.tolist())
    for place, (ids, trained, truncated) in found:
        assert ids.tolist() == made[place].ids.tolist()
        assert trained.tolist() == made[place].trained.tolist()
        assert truncated == made[place].truncated


def test_spool_memory_is_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "BUCKET", 256)
    monkeypatch.setattr(spool, "WAITING", 1 << 20)

    def peak(count: int) -> int:
        one = Document(np.zeros(500, np.int32), np.ones(500, bool))
        step = count // 20  # every table touches every bucket
        tables = (to_table(np.arange(s, count, step), [one] * 20) for s in range(step))
        tracemalloc.start()
        spool_dir = tmp_path / str(count)
        write_spool(tables, spool_dir)
        assert sum(1 for _ in read_spool(spool_dir)) == count
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(20_000) < 1.5 * peak(2_000) + 1e6
