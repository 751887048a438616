"""The rows that scores and SparseGPT are calibrated on, and what waits on disk meanwhile."""

import pytest

from loram.errors import UserError
from loram.model import save
from pipelines.imitate import TargetsConfig, calibration, targets
from pipelines.place import Place
from tests.conftest import tiny_model
from tests.rows import packed_rows
from tests.test_distil import stumbling


def test_the_first_rows_of_the_corpus_or_a_refusal(tmp_path):
    rows = packed_rows(tmp_path / "train").rows
    found, tokens = calibration(tmp_path, rows, Place(micro_batch=4))
    assert sum(len(batch["row"]) for batch in found) == rows and tokens == 64 * rows
    with pytest.raises(UserError, match=f"calibration_rows: found {rows + 1}; accepted: at most"):
        calibration(tmp_path, rows + 1, Place())


def test_after_a_crash_the_micro_batch_may_be_another(tmp_path, monkeypatch):
    packed_rows(tmp_path / "corpus" / "train")
    save(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "out").mkdir()
    asked = stumbling(monkeypatch)
    config, paths = (
        TargetsConfig(top=4, hidden_layers=1, rows=8, seed=0),
        {"corpus": tmp_path / "corpus"},
    )
    paths |= {"model": tmp_path / "model", "out": tmp_path / "out", "work": tmp_path / "work"}
    with pytest.raises(OSError, match="No space"):
        targets(config, place=Place(micro_batch=4), **paths)
    found = targets(config, place=Place(micro_batch=2), **paths)
    assert asked == [0, 1, 2, 3, 0, 1] + [0, 1, 2, 3] * 4 and found["bytes"] > 0
