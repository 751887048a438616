"""What a study makes of its points: means, pictures, the page."""

import json
import math
from dataclasses import replace

import pytest

from pipelines.recipe import flat
from pipelines.results import Row
from tune import study_page
from tune.arms import ask
from tune.draw import picture
from tune.draw_costs import draw_costs
from tune.points import SEARCH, Cell, Cost, Point, Seen, means, spread


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
    single = picture(answer(name, seeds=("4",), rates=()))
    assert single.get_suptitle() == "one seed (4), no error bars"
    assert "own best rate" not in labels(single)
    assert all(bar.has_yerr is False for axes in single.axes for bar in axes.containers)


def test_the_picture_of_costs_stacks_every_stage_that_took_something():
    figure = draw_costs(answer("cost"))
    assert labels(figure) == {"score", "prune", "align", "quantise", "SFT", SEARCH}
    units = [axes.get_xlabel() for axes in figure.axes]
    assert units == ["tokens (thousands)", "time (s)", "peak memory of a process (GB)"]
    arms = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert arms[0] == "LoRA" and len(arms) == 5


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
