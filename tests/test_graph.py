"""Which steps a recipe asks for, and which of its settings reach each."""

import pytest

import tune.trial
from loram.errors import UserError
from pipelines.graph import build
from pipelines.locate import all_sources
from pipelines.recipes import resolve
from pipelines.step import Source, Step, order


def steps(*changes: str) -> dict[str, Step]:
    """The steps of the recipe for tests with these changes, by name."""
    recipe = resolve("test", list(changes))
    sources = {spec.path: Source("data", spec.path, spec.path) for spec in all_sources(recipe)}
    graph = build(recipe, Source("model", recipe.model, "digest"), sources)
    return {step.name: step for step in order([v.evaluate for v in graph.variants])}


def test_only_the_small_model_has_masks():
    """LoRA and QLoRA on the full model are the same with `adapter.masked` as without it."""
    plain, masked = (
        steps("prune.method=semi", 'compare=["lora","qlora"]', f"adapter.masked={value}")
        for value in ("false", "true")
    )
    assert masked["sft"].config.adapter.masked
    for name in plain:
        changed = name in ("sft", "recover", "evaluate_small", "evaluate_large")
        assert (plain[name].key != masked[name].key) == changed


def test_offsets_are_of_the_rows_and_of_the_small_model():
    """Another rate, or an end before the last step, finds them in the store."""
    without, plain = steps(), steps("offset.layers=2")
    assert "offsets" not in without
    changed = {name for name in without if without[name].key != plain[name].key}
    assert changed == {"sft", "recover", "evaluate_small", "evaluate_large"}
    for same in ("sft.lr=1e-4", "sft.stop=2", "adapter.r=4"):
        assert steps("offset.layers=2", same)["offsets"].key == plain["offsets"].key
    for other in ("sft.steps=8", "sft.seed=1", "prune.ratio=0.25", "nf4=false"):
        assert steps("offset.layers=2", other)["offsets"].key != plain["offsets"].key


def test_a_trial_makes_the_offsets_of_its_rows_and_nothing_else(monkeypatch):
    started = []
    monkeypatch.setattr(tune.trial, "going_on", lambda earlier, step: started.append(step.name))
    made = steps("offset.layers=2")
    for name in ("offsets", "sft"):
        tune.trial._training({}, made[name])
    assert started == ["offsets", "sft"]
    with pytest.raises(UserError, match="store: found one from which quantise"):
        tune.trial._training({}, made["quantise"])
