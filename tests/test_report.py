"""The table and the page: what they say, and when a share of gain is not told."""

import json
from dataclasses import replace

import pytest

from pipelines import report
from pipelines.results import Row, headline, share_of_gain

ROWS = [
    Row("base", 2.0, 7.39, 20.0),
    Row("LoRA", 1.5, 4.48, 21.0, 134_515_008, 269_030_016, 1.0, 290.0, 2_000_000_000, 1.0),
    Row("QLoRAM-Stru, large", 1.8, 6.05, 20.5, 86_000_000, 9e7, 2.99, 400.0, 1_500_000_000, 0.4),
]


def test_share_of_gain():
    assert share_of_gain(2.0, 1.5, 1.8) == pytest.approx(0.4)
    assert share_of_gain(2.0, 1.5, 2.1) == pytest.approx(-0.2)
    assert share_of_gain(2.0, 1.81, 1.9) is None  # full LoRA gained less than 0.2 nats


def test_small_gain_is_said_to_mean_nothing():
    rows = [replace(row, share=None, loss=1.9 if row.label == "LoRA" else 2.0) for row in ROWS]
    assert "means nothing" in " ".join(report.notes(rows))
    assert "0.100 nats" in " ".join(report.notes(rows))
    assert "means nothing" not in " ".join(report.notes(ROWS))
    assert "no LoRA" in " ".join(report.notes(ROWS[:1]))


def test_headline_names_do_not_depend_on_the_variant():
    names = headline(ROWS)
    assert names["large_loss"] == 1.8 and names["base_loss"] == 2.0
    other = headline(
        [replace(row, label=row.label.replace("QLoRAM-Stru", "LoRAM-Rand")) for row in ROWS]
    )
    assert names.keys() == other.keys()


def test_a_score_is_shown_where_it_was_asked_for_and_nowhere_else():
    scored = [replace(row, score=0.125) for row in ROWS]
    assert "score" in [name for name, _ in report.columns(scored)]
    assert dict(report.columns(scored))["score"](scored[0]) == "12.5 %"
    assert any("strict match" in line for line in report.notes(scored))
    assert headline(scored)["large_score"] == headline(scored)["base_score"] == 0.125
    assert "score" not in [name for name, _ in report.columns(ROWS)]
    assert not any("score" in line for line in report.notes(ROWS))
    assert not any("score" in name for name in headline(ROWS))


def test_page_holds_everything_and_loads_nothing(tmp_path):
    curve = [{"step": i, "loss": 3 - i / 10, "tokens_per_second": 300.0} for i in range(1, 9)]
    curve.append({"step": 8, "held_out_loss": 2.5})
    report.write(
        tmp_path,
        ROWS,
        {"align": curve, "sft": curve, "sft_lora": curve},
        [
            {"name": "prune", "key": "0123456789abcdef", "seconds": 3.2, "metrics": {}},
            {"name": "sft", "key": "ab", "seconds": 50.0, "metrics": {"startup_seconds": 31.4}},
        ],
        {"name": "<small>", "sft.lr": 1e-3},
        {"torch": "2.13.0"},
    )
    page = (tmp_path / "report.html").read_text()
    for text in ("QLoRAM-Stru, large", "40 %", "&lt;small&gt;", "0123456789ab", "torch", "sft.lr"):
        assert text in page
    assert "<td>50.0</td><td>31.4</td>" in page and "<td>3.2</td><td></td>" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:' in page
    assert json.loads((tmp_path / "table.json").read_text())[2]["share"] == 0.4
    for name in ("losses", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
