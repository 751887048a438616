"""The table and the best of a sweep, from trials that were never run."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.recipes import read, resolve
from tune import page
from tune.plan import Plan
from tune.rungs import stopped
from tune.search import Outcome
from tune.space import space


def outcome(name: str, loss: float, base: float = 2.0, **given) -> Outcome:
    """A trial of sft.lr whose large model ends with these losses."""
    scores = {"large_loss": loss, "base_loss": base, "large_ppl_out": 9 - loss, "base_ppl_out": 8.0}
    recipe = stopped(resolve("test", []), given.pop("step", 4))
    values = {"sft.lr": 1e-3} | given.pop("values", {})
    return Outcome(name, recipe, values, recipe.sft.stop or 4, loss, "", scores, **given)


FAILED = Outcome("bad", resolve("test", []), {"sft.lr": 9.0}, 2, float("inf"), "loss nan")


@pytest.fixture
def plan() -> Plan:
    found, plain = space("test", ["sft.lr=1e-4..1e-2"])
    return Plan("test", tuple(plain), found, 8, "large_loss", 0, None)


def test_the_best_is_by_the_metric_that_was_asked_for():
    trials = [outcome("a", 1.5), FAILED, outcome("b", 1.2)]
    assert page.best_of(trials, "large_loss").name == "b"
    assert page.best_of(trials, "large_ppl_out").name == "a"
    assert page.best_of([FAILED], "large_loss") is None


def test_losses_on_other_rows_are_compared_beside_their_own_base():
    trials = [outcome("short", 1.0, base=1.1), outcome("long", 1.5, base=2.0)]
    assert page.best_of(trials, "large_loss").name == "long"


def test_a_failed_trial_is_last_and_has_no_steps(plan, tmp_path: Path):
    trials = [FAILED, outcome("early", 1.5, step=2), outcome("whole", 1.2)]
    head, body = page._rows(plan, trials)
    assert [row[0] for row in body] == ["whole", "early", "bad"]
    steps, remark = head.index("steps"), head.index("remark")
    assert [row[steps] for row in body] == ["4", "2", "-"]
    assert [row[remark] for row in body] == ["", "stopped early", "loss nan"]
    page.write(tmp_path, plan, trials, {})
    assert (tmp_path / "report.html").exists() and (tmp_path / "large_loss-sft-lr.svg").exists()
    assert "sft.stop=2" in page.line(plan, trials[1]) and "stop" not in page.line(plan, trials[2])


def test_the_line_of_the_best_names_the_commit_of_a_hub_model(plan):
    best, model = outcome("b", 1.2), f"owner/name@{'1' * 40}"
    assert "model" not in page.line(plan, best)
    pinned = replace(best, recipe=replace(best.recipe, model=model))
    assert read("test", shlex.split(page.line(plan, pinned))[1:]).model == model
