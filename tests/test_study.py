"""Studies: what is planned, what is refused, what is made of the points."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib import pyplot as plt

from loram.errors import UserError
from pipelines.execute import Event
from pipelines.recipe import flat
from pipelines.results import Row
from pipelines.session import Session
from pipelines.step import Source, order
from pipelines.store import Store
from tune import study_page
from tune.arms import ask
from tune.draw import picture
from tune.draw_costs import draw_costs
from tune.points import SEARCH, Cell, Cost, Point, Seen, means, spread
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
    offsets = ["offset.layers=2", "offset.parts=2"]
    study, trainings = planned("cost", *offsets, methods=["stru"], rates=["9"])
    made = []

    def execute(targets, store, launch, place, on, at_once):
        for step in order(targets):
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


def test_spread_is_of_the_values_that_are_there():
    assert spread([1.0, 3.0, None]).mean == 2.0
    assert spread([1.0, 3.0]).sd == pytest.approx(math.sqrt(2))
    assert spread([5]).sd == 0 and spread([5]).n == 1
    assert spread([None]) is None


def answer(name: str, *, seeds=("0", "1", "2"), rates=("3e-3",), lost=None) -> Seen:
    """A made-up answer in which large inference is good, small is not, and seeds differ."""
    study = ask(name, "test", ["sft.eval_every=1"], seeds=seeds, rates=rates or None)

    def row(label, perplexity, seed, score=None):
        perplexity += 0.1 * seed
        return Row(
            label, math.log(perplexity), perplexity, 2 * perplexity, score=score, reduction=2.0
        )

    scored = 0.25 if name == "ratio" else None
    points = [Point(Cell("base", "full"), None, row("base", 6.0, 0, scored))]
    costs = []
    for number, arm in enumerate(study.arms):
        place = {} if arm.full else {"ratio": arm.recipe.prune.ratio}
        place |= {} if arm.full else {"aligned": arm.recipe.align.steps > 0}
        kinds = {"full": 4.0} if arm.full else {"large": 5.0 + 0.2 * number}
        if name == "recovery" and not arm.full:
            kinds["small"] = 30.0 - number
        for seed in study.seeds:
            for step in study.stops:
                for rate in ["shared", *(["best"] if rates else [])]:
                    for kind, height in kinds.items():
                        cell = Cell(arm.label, kind, rate, 1e-3, step, **place)
                        height += 2 / step - (0.3 if rate == "best" else 0)
                        points.append(Point(cell, seed, row(arm.label, height, seed, scored)))
            if name == "ratio" and not arm.full:
                height = 100 * arm.recipe.prune.ratio
                cell = Cell(arm.label, "untrained", **place)
                points.append(Point(cell, seed, row(arm.label, height, seed, 0.0)))
            stages = ["SFT"] if arm.full else ["score", "prune", "align", "quantise", "SFT"]
            for at, stage in enumerate([*stages, *([SEARCH] if rates else [])]):
                tokens = None if stage in ("prune", "quantise") else 4e4
                costs.append(Cost(arm.title, stage, seed, tokens, 9.0 * at + seed, 1e9 + 2e8 * at))
    best = {arm.title: 3e-3 for arm in study.arms}
    return Seen(study, points, costs, best, lost or {})


def test_means_are_over_seeds_of_the_same_cell_alone():
    seen = answer("recovery", seeds=("0", "2"))
    found = means(seen.points)
    cell = next(c for c in found if c.inference == "large" and c.rate == "shared" and c.aligned)
    values = [p.row.perplexity for p in seen.points if p.cell == cell]
    assert found[cell]["perplexity"].mean == pytest.approx(sum(values) / 2)
    assert found[cell]["perplexity"].sd == pytest.approx(0.2 / math.sqrt(2))
    assert "score" not in found[cell]
    assert len(found) == 1 + 2 * (1 + 4 * 2 * 2)


def labels(figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


@pytest.mark.parametrize(
    ("name", "x", "inside"),
    [
        ("steps", "optimiser step of SFT", {"LoRA", "QLoRAM-Stru", "own best rate"}),
        ("recovery", "", {"recovered, aligned", "not recovered, not aligned", "shared rate"}),
        ("ratio", "pruning ratio (prune.ratio)", {"QLoRAM-Unst", "small model, not fine-tuned"}),
    ],
)
def test_pictures_say_what_they_show(name, x, inside):
    figure = picture(answer(name))
    assert inside | {"base, not fine-tuned"} <= labels(figure)
    assert {axes.get_xlabel() for axes in figure.axes} == {x}
    panels = [axes.get_ylabel() for axes in figure.axes]
    assert panels[:2] == ["perplexity, in domain", "perplexity, out of domain"]
    assert panels[2:] == (["right answers, in domain (%)"] if name == "ratio" else [])
    assert "standard deviation over 3 seeds (0, 1, 2)" in figure.get_suptitle()
    assert all(axes.containers for axes in figure.axes)  # error bars
    plt.close(figure)
    single = picture(answer(name, seeds=("4",), rates=()))
    assert single.get_suptitle() == "one seed (4), no error bars"
    assert "own best rate" not in labels(single)
    assert all(bar.has_yerr is False for axes in single.axes for bar in axes.containers)
    plt.close(single)


def test_the_picture_of_costs_stacks_every_stage_that_took_something():
    figure = draw_costs(answer("cost"))
    assert labels(figure) == {"score", "prune", "align", "quantise", "SFT", SEARCH}
    units = [axes.get_xlabel() for axes in figure.axes]
    assert units == ["tokens (thousands)", "time (s)", "peak memory of a process (GB)"]
    arms = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert arms[0] == "LoRA" and len(arms) == 5
    plt.close(figure)


def test_the_page_holds_everything_and_loads_nothing(tmp_path):
    seen = answer("ratio", lost={"LoRA, rate 3, seed 0": "sft: loss nan"})
    study_page.write(tmp_path, seen, flat(seen.study.recipe), {"torch": "2.13.0"})
    page = (tmp_path / "report.html").read_text()
    for text in ("QLoRAM-Stru 0.65", "±", "strict match", "lowest held-out loss", "2.13.0",
                 "loss nan", "sft.lr", "<h2>Cost</h2>"):  # fmt: skip
        assert text in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:' in page
    assert (tmp_path / "ratio.png").read_bytes()[1:4] == b"PNG"
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["best_rates"]["LoRA"] == 3e-3 and found["seeds"] == [0, 1, 2]
    assert len(found["means"]) == len(means(seen.points))
    assert study_page.scores(seen)["QLoRAM-Stru/0.65/large/best/score"] == 0.25


def test_without_rates_or_an_evaluation_set_of_its_own_the_page_says_so():
    seen = answer("recovery", rates=())
    assert any("no --rates given" in line for line in study_page.notes(seen))
    assert not any("score" in line for line in study_page.notes(seen))
    chosen = answer("recovery")
    evaluate = replace(chosen.study.recipe.evaluate, in_domain=())
    study = replace(chosen.study, recipe=replace(chosen.study.recipe, evaluate=evaluate))
    assert any("by which rates were chosen" in line for line in
               study_page.notes(replace(chosen, study=study)))  # fmt: skip
