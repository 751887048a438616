"""A search that goes on: its notes, what it tries first, what it does not stop anew."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest
from ray.tune.search.optuna import OptunaSearch

from loram.errors import UserError
from pipelines.place import Place
from pipelines.recipes import resolve
from tune.notes import Notes
from tune.search import _Asha, _domain, _Ends, _outcome, _points, check_capacity
from tune.space import Range


def test_a_note_torn_by_a_kill_is_left_out_and_nothing_is_glued_to_it(tmp_path):
    notes = Notes.open(tmp_path)
    notes.write(trial="a", values={"sft.lr": 0.1 + 0.2})
    with notes.file.open("a") as file:
        file.write('{"trial": "b", "val')
    again = Notes.open(tmp_path)
    again.write(values={"sft.lr": 0.1 + 0.2}, ended=2)
    again.write(trial="c", values={"sft.lr": 0.5})
    assert again.begun() == [{"sft.lr": 0.1 + 0.2}, {"sft.lr": 0.5}]
    assert again.ended({"sft.lr": 0.1 + 0.2}) == 2


def test_equal_values_are_one_trial_that_ended_where_the_longer_one_did(tmp_path):
    notes = Notes.open(tmp_path)
    for ended in (2, 4, 2):
        notes.write(trial="x", values={"adapter.r": 4})
        notes.write(values={"adapter.r": 4}, ended=ended)
    notes.write(trial="y", values={"adapter.r": 8})
    assert notes.begun() == [{"adapter.r": 4}, {"adapter.r": 8}]
    assert notes.ended({"adapter.r": 4}) == 4 and notes.ended({"adapter.r": 8}) is None


def test_what_was_noted_is_proposed_again_to_the_last_bit():
    domains = {"sft.lr": _domain(Range(1e-5, 1e-3)), "sft.warmup_steps": _domain(Range(1, 9))}

    def proposed(points, count):
        search = OptunaSearch(
            domains, metric="x", mode="min", points_to_evaluate=points or None, seed=len(points)
        )
        return [search.suggest(str(number)) for number in range(count)]

    first = proposed([], 3)
    again = proposed(json.loads(json.dumps(first)), 4)
    assert again[:3] == first and again[3] not in first


def test_a_trial_that_was_killed_before_its_first_report_is_a_failed_one():
    recipe = resolve("test", ["offset.every=2"])
    told = SimpleNamespace(metrics=None, config={"sft.lr": 1e-3}, path="a/b", error="died\nwhy")
    outcome = _outcome({}, recipe, ["sft.lr"], told)
    assert (outcome.name, outcome.step, outcome.error) == ("b", 0, "why")
    assert outcome.recipe.sft.stop is None and outcome.recipe.sft.lr == 1e-3


def test_lists_are_tried_once_each_and_ranges_go_on_with_what_was_begun():
    lists = {"adapter.r": [4, 8], "sft.lr": [1e-3, 2e-3]}
    points, trials = _points(lists, [{"adapter.r": 8, "sft.lr": 1e-3}], 9, 0)
    every = [dict(zip(lists, pair, strict=True)) for pair in itertools.product(*lists.values())]
    assert (points, trials) == (every, 4)
    begun = [{"adapter.r": 4, "sft.lr": 1e-3}]
    points, trials = _points(lists, begun, 3, 0)
    assert points[:1] == begun and trials == 3 >= len(points)
    assert all(points.count(point) == 1 for point in points)
    begun = [{"adapter.r": 4, "sft.clip": 0.3}]
    ranged = {"adapter.r": [4, 8], "sft.clip": Range(0.1, 1)}
    points, trials = _points(ranged, begun, 3, 0)
    assert points[:1] == begun and (len(points), trials) == (3, 3)
    assert _points({}, [{}], 9, 0) == ([{}], 1)


def test_the_first_trials_are_spread_evenly_and_again_the_same():
    searched = {"sft.lr": Range(1e-5, 1e-1), "adapter.r": [4, 8], "sft.warmup_steps": Range(1, 100)}
    points, _ = _points(searched, [], 4, 0)
    columns = {key: sorted(point[key] for point in points) for key in searched}
    assert columns["sft.lr"] == pytest.approx([10**-4.5, 10**-3.5, 10**-2.5, 10**-1.5])
    assert columns["adapter.r"] == [4, 4, 8, 8]
    assert columns["sft.warmup_steps"] == [2, 6, 18, 56]
    assert _points(searched, points[:2], 4, 0)[0] == points
    assert _points(searched, [], 4, 1)[0] != points
    assert len(_points(searched, [], 99, 0)[0]) == 10


@pytest.mark.parametrize(("again", "decision"), [(False, "STOP"), (True, "CONTINUE")])
def test_a_trial_that_was_over_is_not_stopped_anew(again, decision):
    asha = _Asha(
        time_attr="step", metric="loss", mode="min", grace_period=2, reduction_factor=2, max_t=9
    )
    results = [{"step": 2, "loss": loss, "again": again} for loss in (1.0, 2.0, 3.0)]
    for name, result in zip("abc", results, strict=True):
        trial = SimpleNamespace(trial_id=name)
        asha.on_trial_add(None, trial)
        last = asha.on_trial_result(None, trial, result)
    assert last == decision


def test_a_failed_trial_is_not_over(tmp_path):
    notes = Notes.open(tmp_path)
    for r, error in ((4, ""), (8, "out of memory")):
        trial = SimpleNamespace(config={"adapter.r": r}, last_result={"step": 2, "error": error})
        _Ends(notes).on_trial_complete(1, [], trial)
    assert notes.ended({"adapter.r": 4}) == 2 and notes.ended({"adapter.r": 8}) is None


def test_trials_at_a_time():
    cpus = os.cpu_count()
    check_capacity(Place(cpus_per_worker=1), cpus)
    check_capacity(Place(cpus_per_worker=cpus), None)
    with pytest.raises(UserError, match=f"--concurrent: .*at most {cpus} here"):
        check_capacity(Place(cpus_per_worker=1), cpus + 1)
    with pytest.raises(UserError, match="place.workers: .*at most 0 here"):
        check_capacity(Place(workers=2, cpus_per_worker=cpus), None)
