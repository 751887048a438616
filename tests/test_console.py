"""What a person sees of a training while it runs."""

import json

import pytest

import pipelines.console
from pipelines.console import Console
from pipelines.execute import CURVE, Event
from tests.test_graph import trained


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_training_in_parts_counts_the_steps_up_to_the_end_of_its_part(
    part, tmp_path, monkeypatch, capsys
):
    """And says so in a log, which has no bars."""
    monkeypatch.setattr(pipelines.console, "EVERY_S", 0.01)
    monkeypatch.setattr(pipelines.console, "LINE_EVERY_S", 0.0)
    step, line = (
        trained()[part],
        {"step": 1, "loss": 2.5, "tokens_per_second": 1e3, "seconds": 60.0},
    )
    (tmp_path / CURVE).write_text(json.dumps(line) + "\n")
    with Console() as console:
        console.on(Event("started", step, tmp_path))
        console.stopped.wait(0.5)
    ends = (1, 3, 4)[part]
    said = f"step 1/{ends}  loss 2.500  1,000 tokens/s  {ends - 1:.1f} min left"
    assert said in capsys.readouterr().out
