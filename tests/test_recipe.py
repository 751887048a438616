"""Recipes: names, changes, wrong keys and types, and the way through a file."""

import dataclasses

import pytest

from loram.errors import UserError
from pipelines.recipe import flat, write_recipe
from pipelines.recipes import NAMED, resolve


def test_changes_are_applied_with_their_types():
    recipe = resolve("small", ["sft.lr=3e-4", "prune.method=rand", "nf4=false", "align.steps=7"])
    assert recipe.sft.lr == 3e-4 and recipe.prune.method == "rand"
    assert recipe.nf4 is False and recipe.align.steps == 7
    sources = '[{"path": "a.jsonl", "weight": 2}, {"path": "b.parquet"}]'
    recipe = resolve("small", [f"corpus.sources={sources}", 'compare=["lora","qlora"]'])
    assert [source.weight for source in recipe.corpus.sources] == [2.0, 1.0]
    assert recipe.compare == ("lora", "qlora")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smal", "", "recipe: found 'smal'; accepted: small, test, llama2-13b"),
        ("small", "sft.lrr=1", "recipe key: found 'sft.lrr'; accepted: .*sft.lr"),
        ("small", "sft=1", "recipe key: found 'sft'"),
        ("small", "sft.lr", "argument: found 'sft.lr'; accepted: key=value"),
        ("small", "sft.lr=fast", 'sft.lr: found "fast"; accepted: a valid number'),
        ("small", "sft.steps=2.5", "sft.steps: found 2.5; accepted: a valid integer"),
        ("small", "nf4=1", "nf4: found 1; accepted: a valid boolean"),
        ("small", "model=3", "model: found 3; accepted: a valid string"),
        ("small", 'corpus.sources=[{"pth": "x"}]', "corpus.sources.0.p"),
    ],
)
def test_mistakes_are_named(name, change, message):
    with pytest.raises(UserError, match=message):
        resolve(name, [change] if change else [])


@pytest.mark.parametrize("name", NAMED)
def test_a_written_recipe_resolves_to_itself(name, tmp_path):
    recipe = resolve(name, ["sft.seed=3"])
    write_recipe(recipe, tmp_path / "recipe.json")
    assert resolve(str(tmp_path / "recipe.json"), []) == recipe
    changed = resolve(str(tmp_path / "recipe.json"), ["sft.seed=4"])
    assert changed == dataclasses.replace(recipe, sft=dataclasses.replace(recipe.sft, seed=4))


def test_damaged_recipe_files_are_refused(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        resolve(str(tmp_path / "recipe.json"), [])
    (tmp_path / "recipe.json").write_text('{"name": "x", "colour": "red"}')
    with pytest.raises(UserError, match="recipe key: found 'colour'"):
        resolve(str(tmp_path / "recipe.json"), [])
    (tmp_path / "table.json").write_text("[1]")
    with pytest.raises(UserError, match="a JSON list or value"):
        resolve(str(tmp_path / "table.json"), ["sft.lr=1e-4"])


def test_a_recipe_reads_the_same_files_wherever_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = ['instruct.sources=[{"path": "chats.jsonl"}]', "model=model", "evaluate.in_domain=[]"]
    recipe = resolve("test", words)
    assert recipe.instruct.sources[0].path == str(tmp_path / "chats.jsonl")
    assert recipe.model == str(tmp_path / "model")
    hub = resolve("llama2-13b", [])
    assert hub.model.startswith("meta-llama/") and hub.corpus.sources[0].path.startswith("hf://")


def test_a_secret_in_a_uri_leaves_a_recipe_that_can_be_read(tmp_path):
    recipe = resolve("test", ["tracking=http://host/?api_key=abc"])
    write_recipe(recipe, tmp_path / "recipe.json")
    assert "abc" not in (tmp_path / "recipe.json").read_text()
    assert resolve(str(tmp_path / "recipe.json"), []).tracking == "http://host/?api_key=***"


def test_flat_names_are_dotted_and_have_plain_values():
    names = flat(resolve("llama2-70b", []))
    assert names["prune.ratio"] == 0.85 and names["sft.lr"] == 1e-3
    assert all(isinstance(value, int | float | str) for value in names.values())
    assert flat(resolve("small", [])).keys() == names.keys()
