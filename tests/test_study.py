"""Studies: what is planned, what is refused, which rate is chosen."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from loram.errors import UserError
from pipelines.execute import Event
from pipelines.session import Session
from pipelines.step import Source, topological_order
from pipelines.store import Store
from tune.arms import ask
from tune.rungs import parts
from tune.study import _execute, main
from tune.trainings import evaluations, named, own_best, plan, wanted


def planned(*words, **lists):
    """The study and its trainings, of made-up sources."""
    study = ask(words[0], "test", list(words[1:]), **lists)
    specs = (
        *study.recipe.corpus.sources,
        *study.recipe.instruct.sources,
        *study.recipe.evaluate.in_domain,
        *study.recipe.evaluate.out_of_domain,
    )
    sources = {spec.path: Source("data", spec.path, spec.path) for spec in specs}
    return study, plan(study, Source("model", "model", "model"), sources)


def kinds(study, trainings) -> Counter:
    """How many different steps of each name the study asks for."""
    names = {step.key: step.name for t in trainings for step in [t.sft, *evaluations(study, [t])]}
    return Counter(names.values())


def test_steps_trains_each_method_and_full_lora_rung_by_rung():
    study, trainings = planned("steps", "sft.steps=8", "sft.eval_every=2", methods=["stru", "semi"])
    assert study.stops == [2, 4, 6, 8]
    assert [arm.label for arm in study.arms] == ["LoRA", "QLoRAM-Stru", "QLoRAM-Semi"]
    assert [t.recipe.sft.stop for t in trainings[::3]] == [2, 4, 6, None]
    assert kinds(study, trainings) == {
        "sft": 8,
        "sft_lora": 4,
        "evaluate_large": 8,
        "evaluate_lora": 4,
        "evaluate_base": 1,
    }


def test_recovery_has_both_inferences_of_both_small_models():
    study, trainings = planned("recovery", methods=["rand"], seeds=["0", "1"])
    assert [arm.title for arm in study.arms] == [
        "LoRA",
        "QLoRAM-Rand, aligned",
        "QLoRAM-Rand, not aligned",
    ]
    counted = kinds(study, trainings)
    assert counted["evaluate_small"] == counted["evaluate_large"] == 4
    assert [arm.recipe.align.steps for arm in study.arms[1:]] == [4, 0]


def test_ratio_cuts_groups_at_every_ratio_and_single_weights_at_their_own():
    study, trainings = planned("ratio", methods=["stru", "semi", "unst"])
    ratios = [(arm.label[-4:], arm.recipe.prune.ratio) for arm in study.arms[1:]]
    stru = [("Stru", x) for x in (0.65, 0.75, 0.85, 0.95)]
    assert ratios == [*stru, ("Semi", 0.5), ("Unst", 0.55)]
    assert study.recipe.evaluate.answers == 50
    assert kinds(study, trainings)["evaluate_untrained"] == 6
    chosen, _ = planned("ratio", "evaluate.answers=3", methods=["semi", "unst"], ratios=["0.2"])
    assert [arm.recipe.prune.ratio for arm in chosen.arms[1:]] == [0.5, 0.2]
    assert chosen.recipe.evaluate.answers == 3


def test_a_ratio_of_the_recipe_is_of_groups_unless_it_was_typed():
    def ratios(*words):
        study = ask("cost", "test", list(words))
        return [arm.recipe.prune.ratio for arm in study.arms[1:]]

    assert ratios() == [0.5, 0.5, 0.5, 0.55]  # rand, stru, semi, unst
    assert ratios("prune.ratio=0.3") == [0.3, 0.3, 0.5, 0.3]


def test_rates_add_trainings_of_one_small_model_and_no_second_pruning():
    study, trainings = planned("recovery", methods=["stru"], rates=["1e-4", "1e-3"])
    assert study.candidates == [1e-3, 1e-4]  # the shared one is among them and trained once
    assert len(trainings) == 6
    frozen = {t.graph.variants[-1].frozen.key for t in trainings if not t.arm.full}
    assert len(frozen) == 2


def test_seeds_change_what_is_drawn_and_nothing_else():
    _, trainings = planned("cost", methods=["stru", "rand"], seeds=["0", "1"])
    pruned = {m: {t.graph.pruned.key for t in trainings if t.arm.label.endswith(m)} for m in
              ("Stru", "Rand")}  # fmt: skip
    assert len(pruned["Stru"]) == 1 and len(pruned["Rand"]) == 2
    assert {(t.recipe.sft.seed, t.recipe.align.seed) for t in trainings} == {(0, 0), (1, 1)}


def test_shared_steps_are_tagged_so_and_others_with_their_variant():
    study, trainings = planned("cost", methods=["stru", "semi"])
    variants = {}

    def on(event, params, tags):
        variants[event.step.key] = tags["variant"]

    note = Session.noted(SimpleNamespace(on=on), wanted(study, trainings))
    base = trainings[0].graph.variants[0].evaluate
    for step in [base, *(t.sft for t in trainings)]:
        note(Event("started", step, Path()))
    by_variant = {variants[t.sft.key]: t.arm.label for t in trainings}
    assert by_variant == {"lora": "LoRA", "stru": "QLoRAM-Stru", "semi": "QLoRAM-Semi"}
    assert variants[base.key] == "shared"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "study: found 'speed'"),
        (["steps", "test", "--methods", "stru", "best"], "--methods: found 'best'"),
        (["steps", "test", "--methods", "stru", "stru"], "--methods: found stru twice"),
        (["steps", "test", "--methods"], "--methods: found none"),
        (["steps", "test", "--seeds"], "--seeds: found none"),
        (["steps", "test", "--seeds", "0", "0"], "--seeds: found 0 twice"),
        (["steps", "test", "--seeds", "1.5"], "--seeds: found '1.5'"),
        (["steps", "test", "--rates"], "--rates: found none"),
        (["steps", "test", "--rates", "0"], "--rates: found '0'"),
        (["steps", "test", "--rates", "inf"], "--rates: found 'inf'"),
        (["steps", "test", "--rates", "1e-3", "0.001"], "--rates: found 0.001 twice"),
        (["ratio", "test", "--ratios", "1"], "--ratios: found '1'"),
        (["ratio", "test", "--ratios", "0.5", "0.5"], "--ratios: found 0.5 twice"),
        (["cost", "test", "--ratios", "0.5"], "--ratios: found the study cost"),
        (["ratio", "test", "prune.ratio=0.5"], "prune.ratio: found a change"),
        (["cost", "test", "prune.method=rand"], "prune.method: found a change"),
        (["recovery", "test", "align.steps=0"], "align.steps: found 0"),
        (["steps", "test", "sft.eval_every=4"], "sft.eval_every: found 4"),
        (["cost", "test", "sft.stop=2"], "sft.stop: found 2"),
        (["cost", "test", 'compare=["bound"]'], "compare: found 'bound'"),
        (["cost", "test", "evaluate.answers=-1"], "evaluate.answers: found -1"),
        (["cost", "test", 'compare=["lora","lora"]'], 'compare: found ["lora", "lora"]'),
        (["cost", "nothing"], "recipe: found 'nothing'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line_before_ray(words, said, capsys, monkeypatch):
    monkeypatch.setattr("tune.study.start_ray", lambda: pytest.fail("Ray was started"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and "accepted: " in error
    assert error.count("\n") == 1


def test_a_rate_that_diverges_is_left_out_and_the_shared_one_may_not(monkeypatch):
    """In any part of its training."""
    offsets = ["offset.every=2", "offset.parts=2"]
    study, trainings = planned("cost", *offsets, methods=["stru"], rates=["9"])
    made = []

    def execute(targets, store, launch, place, on, at_once):
        for step in topological_order(targets):
            if step.key in bad:
                on(Event("failed", step, Path(), text="loss nan"))
                raise UserError("sft: loss nan")
        made.append({step.key for step in targets})

    monkeypatch.setattr("tune.study.execute", execute)
    here = SimpleNamespace(store=None, recipe=study.recipe)
    optional = [t for t in trainings if t.lr == 9]
    targets = [t.sft for t in trainings]
    (lora, small), ours = optional, "QLoRAM-Stru, rate 9, seed 0"
    assert lora.arm.label == "LoRA" and len(parts(small.sft)) == 2
    for training, key, name in (
        (lora, lora.sft.key, "LoRA, rate 9, seed 0"),
        (small, parts(small.sft)[0].key, ours),
        (small, small.sft.inputs["offsets"].key, ours),
    ):
        bad = {key}
        assert _execute(targets, optional, {}, lambda event: None, here) == {name: "loss nan"}
        assert made.pop() == {step.key for step in targets} - {training.sft.key}
    bad = {trainings[0].sft.key}
    with pytest.raises(UserError, match="loss nan"):
        _execute(targets, optional, {}, lambda event: None, here)


def test_the_own_best_rate_is_chosen_by_the_held_out_loss_over_seeds(tmp_path):
    study, trainings = planned("cost", methods=["stru"], rates=["1e-4", "9"], seeds=["0", "1"])
    losses = {1e-3: (2.0, 4.0), 1e-4: (2.5, 2.5), 9: (1.0, 1.0)}
    for t in trainings:
        (tmp_path / t.sft.slug).mkdir()
        found = {"metrics": {"held_out_loss": losses[t.lr][t.seed]}}
        (tmp_path / t.sft.slug / "record.json").write_text(json.dumps(found))
    lost = {named(t): "loss nan" for t in trainings if (t.lr, t.seed, t.arm.full) == (9, 1, True)}
    best = own_best(study, trainings, lost, Store(tmp_path))
    assert {arm.label: lr for arm, lr in best.items()} == {"LoRA": 1e-4, "QLoRAM-Stru": 9}
