"""The trainings of a study: planned before anything runs, and read when they have run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from loram.plan import Size
from pipelines import results
from pipelines.graph import Graph, Variant, build
from pipelines.recipe import Recipe
from pipelines.step import Source, Step
from pipelines.store import Store
from tune.arms import Arm, Study
from tune.points import Cell, Cost, Point, costs
from tune.rungs import stopped


@dataclass(frozen=True)
class Training:
    """One training of an adapter, up to `stop`, and the graph around it."""

    arm: Arm
    seed: int
    lr: float
    stop: int
    recipe: Recipe
    graph: Graph

    @property
    def sft(self) -> Step:
        """The step that trains."""
        step = self.graph.variants[1].sft
        assert step is not None
        return step


def plan(study: Study, model: Source, sources: dict[str, Source]) -> list[Training]:
    """Every training of the study, rung by rung."""
    found = []
    for stop in study.stops:
        for arm in study.arms:
            for seed in study.seeds:
                for lr in study.candidates:
                    recipe = stopped(seeded(arm.recipe, seed, lr), stop)
                    graph = build(recipe, model, sources)
                    found.append(Training(arm, seed, lr, stop, recipe, graph))
    return found


def seeded(recipe: Recipe, seed: int, lr: float) -> Recipe:
    """The recipe with another seed of all that is drawn at random, and another rate of SFT."""
    return replace(
        recipe,
        prune=replace(recipe.prune, seed=seed) if recipe.prune.method == "rand" else recipe.prune,
        align=replace(recipe.align, seed=seed),
        sft=replace(recipe.sft, seed=seed, lr=lr),
    )


def named(training: Training) -> str:
    """What a person calls a training, whatever its rung."""
    return f"{training.arm.title}, rate {training.lr:g}, seed {training.seed}"


def evaluations(study: Study, trainings: list[Training]) -> list[Step]:
    """Of the models that the study looks at, the base's among them."""
    models = [t.arm.models(study.name, t.graph).values() for t in trainings]
    bases = [t.graph.variants[0].evaluate for t in trainings]
    return bases + [variant.evaluate for several in models for variant in several]


def wanted(study: Study, trainings: list[Training]) -> Iterator[tuple[Recipe, str, list[Step]]]:
    """As `Session.noted` wants it: what each training is run for."""
    for t in trainings:
        variant = t.arm.recipe.compare[0] if t.arm.full else t.arm.recipe.prune.method
        yield t.recipe, variant, [*evaluations(study, [t]), t.sft]


def own_best(
    study: Study, trainings: list[Training], lost: Mapping[str, str], store: Store
) -> dict[Arm, float]:
    """Each arm's rate with the lowest held-out loss of the model it was trained on, over seeds."""
    best = {}
    for arm in study.arms:
        losses: dict[float, list[float]] = {}
        for t in trainings:
            if t.arm == arm and t.stop == study.recipe.sft.steps and named(t) not in lost:
                loss = float(store.record(t.sft.slug)["metrics"]["held_out_loss"])
                losses.setdefault(t.lr, []).append(loss)
        whole = {lr: sum(found) for lr, found in losses.items() if len(found) == len(study.seeds)}
        best[arm] = min(whole, key=lambda lr: whole[lr])
    return best


def observed(
    study: Study, chosen: list[Training], best: dict[Arm, float], store: Store, full: Size
) -> list[Point]:
    """What was evaluated: the base, then each arm at the shared rate and at its own best."""

    def row(t: Training, variant: Variant) -> results.Row:
        return results.rows(replace(t.graph, variants=(variant,)), store, full)[0]

    points = [Point(Cell("base", "full"), None, row(chosen[0], chosen[0].graph.variants[0]))]
    for t in chosen:
        rates = ["shared"] if t.lr == study.recipe.sft.lr else []
        rates += ["best"] if study.rates and t.lr == best[t.arm] else []
        for inference, variant in t.arm.models(study.name, t.graph).items():
            cell = Cell(t.arm.label, inference)
            if not t.arm.full:
                aligned = t.arm.recipe.align.steps > 0
                cell = replace(cell, ratio=t.arm.recipe.prune.ratio, aligned=aligned)
            found = row(t, variant)
            if inference != "untrained":
                points += [
                    Point(replace(cell, rate=rate, lr=t.lr, step=t.stop), t.seed, found)
                    for rate in rates
                ]
            elif "shared" in rates:
                points.append(Point(cell, t.seed, found))
    return points


def spent(
    study: Study, trainings: list[Training], lost: Mapping[str, str], store: Store
) -> list[Cost]:
    """What the shared rate's trainings took, and beside them those at other rates."""
    found: list[Cost] = []
    ended = [t for t in trainings if t.stop == study.stops[-1] and named(t) not in lost]
    for t in ended:
        if t.lr == study.recipe.sft.lr:
            tried = [o.sft for o in ended if (o.arm, o.seed) == (t.arm, t.seed) and o is not t]
            found += costs(t.arm.title, t.seed, t.sft, tried, store)
    return found
