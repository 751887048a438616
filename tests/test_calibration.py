"""The rows that scores and SparseGPT are calibrated on."""

import pytest

from loram.errors import UserError
from pipelines.imitate import calibration
from pipelines.place import Place
from tests.rows import packed_rows


def test_the_first_rows_of_the_corpus_or_a_refusal(tmp_path):
    rows = packed_rows(tmp_path / "train").rows
    found, tokens = calibration(tmp_path, rows, Place(micro_batch=4))
    assert sum(len(batch["row"]) for batch in found) == rows and tokens == 64 * rows
    with pytest.raises(UserError, match=f"calibration_rows: found {rows + 1}; accepted: at most"):
        calibration(tmp_path, rows + 1, Place())
