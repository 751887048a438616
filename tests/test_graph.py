"""Which steps a recipe asks for, and which of its settings reach each."""

from pathlib import Path

import pytest

import tune.trial
from loram.errors import UserError
from pipelines.graph import Graph, build
from pipelines.locate import all_sources
from pipelines.recipes import resolve
from pipelines.step import Source, Step, topological_order
from tune.rungs import goes_on, parts, sft_of


def graph(*changes: str) -> Graph:
    """That of the recipe for tests with these changes."""
    recipe = resolve("test", list(changes))
    sources = {spec.path: Source("data", spec.path, spec.path) for spec in all_sources(recipe)}
    return build(recipe, Source("model", recipe.model, "digest"), sources)


def steps(*changes: str) -> dict[str, Step]:
    """Its steps by name, of several parts the last."""
    targets = [variant.evaluate for variant in graph(*changes).variants]
    return {step.name: step for step in topological_order(targets)}


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
    without, plain = steps(), steps("offset.every=2")
    assert "offsets" not in without
    changed = {name for name in without if without[name].key != plain[name].key}
    assert changed == {"sft", "recover", "evaluate_small", "evaluate_large"}
    for same in ("sft.lr=1e-4", "sft.stop=2", "adapter.r=4"):
        assert steps("offset.every=2", same)["offsets"].key == plain["offsets"].key
    for other in ("sft.steps=8", "sft.seed=1", "prune.ratio=0.25", "nf4=false"):
        assert steps("offset.every=2", other)["offsets"].key != plain["offsets"].key


def trained(*changes: str) -> list[Step]:
    """The trainings of an adapter in four steps and three parts, which end after 1, 3 and 4."""
    parted = graph("offset.every=2", "offset.parts=3", *changes)
    return parts(sft_of(parted))


def test_each_part_of_sft_has_the_offsets_of_its_rows_and_goes_on_from_the_one_before():
    first, second, third = trained()
    assert [part.config.train.stop for part in (first, second, third)] == [1, 3, None]
    assert "earlier" not in first.inputs
    assert second.inputs["earlier"] is first and third.inputs["earlier"] is second
    rows = [part.inputs["offsets"].config for part in (first, second, third)]
    assert [(found.first, found.end) for found in rows] == [(0, 4), (4, 12), (12, 16)]
    assert third.inputs["offsets"].inputs["earlier"] is second


def test_a_training_that_stops_in_a_part_goes_on_in_it():
    """As rungs of a sweep and the steps of a study do."""
    whole, entry = trained(), Path("entry")
    for stop, part in ((1, 0), (2, 1), (3, 1)):
        rung = trained(f"sft.stop={stop}")
        assert len(rung) == part + 1 and rung[-1].config.train.stop == stop
        assert [step.key for step in rung[:part]] == [step.key for step in whole[:part]]
        assert (rung[-1].key == whole[part].key) == (stop != 2)
        on = {whole[part].key: entry} if stop == 2 else {}
        assert goes_on(rung[-1], whole[-1], entry) == on
    before, after = sft_of(graph("sft.stop=2")), sft_of(graph())
    assert goes_on(before, after, entry) == {after.key: entry}


def test_a_trial_makes_the_offsets_of_its_rows_and_nothing_else(monkeypatch):
    started = []
    monkeypatch.setattr(tune.trial, "going_on", lambda earlier, step: started.append(step.name))
    made = steps("offset.every=2")
    for name in ("offsets", "sft"):
        tune.trial._training({}, made[name])
    assert started == ["offsets", "sft"]
    with pytest.raises(UserError, match="store: found one from which quantise"):
        tune.trial._training({}, made["quantise"])
