"""What a sweep varies, as a person writes it."""

import pytest
import ray

from loram.errors import UserError
from loram.train import TrainConfig
from pipelines.assets import home
from pipelines.lock import try_lock
from tune.plan import Plan
from tune.rungs import rungs, stopped
from tune.space import Range, replaced, space
from tune.sweep import main


def test_a_range_is_searched_and_a_list_of_ratios_makes_groups():
    found, plain = space("test", ["sft.lr=1e-4..1e-2", "prune.ratio=0.25,0.5", "nf4=false"])
    assert found.searched == {"sft.lr": Range(1e-4, 1e-2)}
    assert found.combinations() == [{"prune.ratio": 0.25}, {"prune.ratio": 0.5}]
    assert plain == ["nf4=false"] and found.recipe.nf4 is False
    assert [recipe.prune.ratio for recipe in found.recipes()] == [0.25, 0.5]
    assert replaced(found.recipe, {"sft.lr": 3e-3}).sft.lr == 3e-3


def test_the_default_is_learning_rate_and_ratio():
    found, _ = space("test", [])
    assert found.searched == {"sft.lr": Range(1e-5, 1e-3)}
    assert [group["prune.ratio"] for group in found.combinations()] == [0.65, 0.75, 0.85, 0.95]


def test_what_was_typed_is_not_swept():
    found, _ = space("test", ["prune.ratio=0.5"])
    assert found.combinations() == [{}] and found.recipe.prune.ratio == 0.5
    assert list(found.searched) == ["sft.lr"]
    found, _ = space("test", ["sft.lr=3e-4"])
    assert found.searched == {} and len(found.combinations()) == 4
    found, _ = space("small", ["prune.method=semi"])
    assert [recipe.prune.ratio for recipe in found.recipes()] == [0.5]


def test_two_lists_make_every_combination_and_training_fields_none():
    found, _ = space("test", ["prune.ratio=0.25,0.5", "prune.method=rand,stru", "adapter.r=4,8"])
    assert len(found.combinations()) == 4
    assert found.searched == {"adapter.r": [4, 8]}


def test_a_ratio_that_was_not_typed_is_that_of_each_method():
    found, _ = space("small", ["prune.method=stru,semi,unst"])
    assert [recipe.prune.ratio for recipe in found.recipes()] == [0.65, 0.5, 0.55]
    found, _ = space("small", ["prune.method=semi", "prune.pattern=4:8,1:4"])
    assert [recipe.prune.ratio for recipe in found.recipes()] == [0.5, 0.25]


def test_rows_of_another_length_are_other_data():
    found, _ = space("test", ["sft.seq_len=128,256", "sft.lr=1e-4..1e-3"])
    assert [recipe.sft.seq_len for recipe in found.recipes()] == [128, 256]


def test_full_lora_is_no_part_of_a_trial():
    assert space("test", [])[0].recipe.compare == ()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("sft.lr=1e-3..1e-5", "sft.lr"),
        ("sft.lr=1e-3..1e-3", "sft.lr"),
        ("sft.lr=0..1e-3", "sft.lr"),
        ("sft.lr=..1e-3", "sft.lr"),
        ("prune.ratio=0.5,", "prune.ratio"),
        ("prune.ratio=0.5,0.5", "prune.ratio"),
        ("prune.ratio=0.1..0.5", "prune.ratio"),
        ("sft.seq_len=128..256", "sft.seq_len"),
        ("sft.global_batch=8..64", "a list such as 8,16"),
        ("sft.speed=1e-5..1e-3", "sft.speed"),
        ("sft.lr=fast,slow", "sft.lr"),
        ("place.workers=1,2", "place.workers"),
        ("sft.steps=1.5..2.5", "sft.steps"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_its_name(change, names):
    with pytest.raises(UserError, match=names.replace(".", r"\.")):
        space("test", [change])


@pytest.mark.parametrize(
    "words", [["--metric", "speed"], ["--trials", "0"], ["--concurrent", "0"], ["nf5=1,2"]]
)
def test_the_command_says_what_is_wrong_in_one_line(words, capsys):
    assert main(["test", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_rungs_are_at_evaluations_from_a_quarter_on():
    assert rungs(TrainConfig(400, 1e-3, eval_every=50)) == [100, 200]
    assert rungs(TrainConfig(20, 1e-3, eval_every=10)) == [10]
    assert rungs(TrainConfig(20, 1e-3, eval_every=20)) == []


def test_a_stopped_trial_is_a_recipe_and_a_finished_one_the_ordinary_recipe():
    recipe = space("test", [])[0].recipe
    assert stopped(recipe, 2).sft.stop == 2
    assert stopped(recipe, recipe.sft.steps) == recipe


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--metric", "speed"], "large_loss, large_ppl_out"),
        (["--concurrent", "4096"], "--concurrent"),
        (["prune.ratio=0.5,1.0"], "prune.ratio"),
        (["prune.ratio=0.5,-0.1"], "prune.ratio"),
        (["prune.ratio=0.5,0.999"], "prune.ratio"),
        (["prune.ratio=0.5,0.6", "prune.method=semi"], "prune.ratio"),
        (["sft.global_batch=4,6", "prune.ratio=0.5"], "sft.global_batch"),
        (["adapter.r=4,0", "prune.ratio=0.5"], "adapter.r"),
        (["prune.method=semi,stru", "adapter.masked=false,true"], "adapter.masked"),
        (["sft.weight_decay=0.1,-1", "prune.ratio=0.5"], "sft.weight_decay"),
        (["--seed", "-1"], "--seed"),
        (["sft.stop=2", "sft.lr=1e-4..1e-3"], "sft.stop"),
        (["sft.stop=1,2"], "sft.stop"),
        (["model=/one,/two"], "one model a sweep"),
        (["sft.lr=1e-3", "prune.ratio=0.5"], "nothing that varies"),
        (["tracking=http://127.0.0.1:9", "prune.ratio=0.5,0.25"], "tracking"),
        (["store=/dev/null/store", "prune.ratio=0.5,0.25"], "not writable"),
    ],
)
def test_what_could_not_run_is_refused_before_ray_starts(words, names, capsys, tmp_path):
    assert main(["test", f"store={tmp_path}", *words]) == 2 and not ray.is_initialized()
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and names in error


def test_a_sweep_runs_once_at_a_time(capsys, tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(home() / "assets")
    monkeypatch.setenv("LORAM_HOME", str(tmp_path))
    found, _ = space("test", ["prune.ratio=0.5,0.25"])
    lock = try_lock(tmp_path / "sweeps" / Plan("", (), found, 8, "", 0, None).key / "lock")
    assert lock and main(["test", "prune.ratio=0.5,0.25"]) == 2
    assert "another process" in capsys.readouterr().err
    lock.release()
