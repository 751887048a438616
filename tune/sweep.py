"""A sweep: `python tune/sweep.py [RECIPE] [key=1e-5..1e-3] [key=0.65,0.75] [key=value ...]`.

Also as a Ray job: `ray job submit --working-dir . -- python tune/sweep.py ...`. What trials share
(data, scores, one small model a ratio) is made once, before them. Each combination of the listed
fields that make another small model has a search of its own (Optuna) with early stopping (ASHA),
since the losses of unlike models do not compare. The same command goes on where it was killed.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout that is not installed

from loram.errors import UserError, refuse  # noqa: E402
from loram.plan import Size, size  # noqa: E402
from pipelines import results  # noqa: E402
from pipelines.assets import home  # noqa: E402
from pipelines.check import check, check_space  # noqa: E402
from pipelines.cluster import check_room, check_shared, nodes, start_ray  # noqa: E402
from pipelines.command import command, parsed  # noqa: E402
from pipelines.execute import CURVE, StepFailed, execute  # noqa: E402
from pipelines.graph import Graph, build  # noqa: E402
from pipelines.journal import redact  # noqa: E402
from pipelines.launch import ray_launch  # noqa: E402
from pipelines.locate import locate  # noqa: E402
from pipelines.lock import try_lock  # noqa: E402
from pipelines.recipe import Recipe  # noqa: E402
from pipelines.session import Session, session  # noqa: E402
from pipelines.settings import check_settings  # noqa: E402
from pipelines.step import Source, Step  # noqa: E402
from pipelines.store import Store  # noqa: E402
from tune import page  # noqa: E402
from tune.follow import Follow, shown  # noqa: E402
from tune.notes import Notes  # noqa: E402
from tune.plan import Plan  # noqa: E402
from tune.rungs import parts, sft_of  # noqa: E402
from tune.search import Outcome, check_capacity, search  # noqa: E402
from tune.space import replaced, space  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="Which learning rate, which pruning ratio?")
    parser.add_argument("--trials", type=int, default=8, help="in each search (8)")
    parser.add_argument("--metric", default=page.METRICS[0], help=" or ".join(page.METRICS))
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--concurrent", type=int, help="trials at a time (as many as fit)")
    given = parsed(parser, words, "LOW..HIGH, a,b,c or value")

    def go() -> int:
        if given.metric not in page.METRICS:
            refuse("--metric", repr(given.metric), ", ".join(page.METRICS))
        for name, least in (("trials", 1), ("concurrent", 1), ("seed", 0)):
            if getattr(given, name) is not None and getattr(given, name) < least:
                refuse(f"--{name}", getattr(given, name), f"{least} or more")
        found, plain = space(given.recipe, given.changes)
        rest = given.trials, given.metric, given.seed, given.concurrent
        return run(Plan(given.recipe, tuple(plain), found, *rest))

    return command(go)


def run(plan: Plan) -> int:
    """Check, make what is shared, search in each group, report."""
    recipe = plan.space.recipe
    store = Store.at(recipe.store)
    for each in plan.space.recipes():
        config = check(each, store.root)
    for each in plan.space.recipes_within():
        check_settings(each, config)
    full = size(config)
    if not os.environ.get("RAY_ADDRESS"):
        check_capacity(recipe.place, plan.concurrent)
    model, sources = locate(recipe, store.root / "digests")
    recipe = dataclasses.replace(recipe, model=model.uri)  # of the hub, the commit
    variants = [each.prune.method for each in plan.space.recipes()]
    tags = {"sweep": plan.key, "stage": "sweep", "variant": ", ".join(sorted(set(variants)))}

    def key(trained: Recipe) -> str:
        return sft_of(build(trained, model, sources)).key

    for each in plan.space.recipes():
        graph = build(each, model, sources)
        check_space(store, each, config, [graph.recovered, graph.variants[0].evaluate])
    mine = home() / "sweeps" / plan.key
    lock = try_lock(mine / "lock")
    if lock is None:
        refuse("sweep", f"{plan.key}, which another process runs", "one process at a time")
    with (
        lock,
        session(recipe, store, f"sweep-{recipe.name}", tags) as here,
        _kept(store),
    ):
        say, tracking = here.say, here.tracking
        say(f"LoRAM sweep {plan.key}: store {store.root}")
        start_ray()
        check_room(recipe.place, say)
        check_shared(recipe, store.root)
        prepared = [_shared(build(r, model, sources)) for r in plan.space.recipes()]
        shared = [step for steps in prepared for step in steps]
        on = here.noted(zip(plan.space.recipes(), variants, prepared, strict=True))
        execute(shared, store, ray_launch, recipe.place, on)
        # Now, for what is shared may have made a cluster grow.
        concurrent = plan.concurrent or max(1, recipe.place.fits(nodes()))
        say(f"trials at a time: {concurrent}")
        outcomes: list[Outcome] = []
        groups = zip(plan.space.combinations(), plan.space.recipes(), strict=True)
        for number, (group, example) in enumerate(groups):
            say(f"search: {shown(group) or 'one group'}")
            # Of other content of model or data nothing is played again.
            notes = Notes.open(mine / f"{number}-{key(example)[:12]}")
            chosen = replaced(recipe, group)
            with Follow(notes, tracking, plan.key, group, recipe, key, say) as follow:
                found = search(
                    group,
                    chosen,
                    plan.space.searched,
                    model,
                    sources,
                    notes,
                    store=store.root,
                    trials=plan.trials,
                    concurrent=concurrent,
                    seed=plan.seed,
                )
            for step in shared:
                if flaw := store.flaw(step.slug, step.key):
                    gone = f"{store.root} ({step.slug}: {flaw})"
                    refuse("store", gone, "a directory that stays and can be written")
            for outcome in _evaluated(found, model, sources, here, full):
                follow.finish(outcome)
                outcomes.append(outcome)
        out = here.report()
        page.write(out, plan, outcomes, store.record(shared[-1].slug)["libraries"])
        tracking.artifact(out, "report")
        best = page.best_of(outcomes, plan.metric)
        if best:
            tracking.scores(best.scores)
        say(page.table(plan, outcomes))
        say(f"report  {out / 'report.html'}\nMLflow  {here.viewer}", soft_wrap=True)
        if best is None:
            raise StepFailed("no trial ended well; the table says why")
        say(f"best    python pipelines/full.py {redact(page.line(plan, best))}", soft_wrap=True)
    return 0


def _evaluated(
    found: list[Outcome], model: Source, sources: dict[str, Source], here: Session, full: Size
) -> Iterator[Outcome]:
    """The trials with their scores; one that cannot be evaluated is a failed one."""
    graphs = [_ends(build(o.recipe, model, sources)) for o in found]
    targets = [[variant.evaluate for variant in graph.variants] for graph in graphs]
    methods = [o.recipe.prune.method for o in found]
    on = here.noted(zip([o.recipe for o in found], methods, targets, strict=True))

    def make(steps: list[Step]) -> None:
        execute(steps, here.store, ray_launch, here.recipe.place, on)

    well = [steps for steps, outcome in zip(targets, found, strict=True) if not outcome.error]
    with contextlib.suppress(UserError, StepFailed):  # found again below, at its trial
        make([step for steps in well for step in steps])
    for graph, steps, outcome in zip(graphs, targets, found, strict=True):
        if outcome.error:
            yield outcome
            continue
        try:
            make(steps)
        except (UserError, StepFailed) as failure:
            yield dataclasses.replace(outcome, error=str(failure))
            continue
        scores = results.headline(results.rows(graph, here.store, full))
        curve = here.store.entry(sft_of(graph).slug) / CURVE
        yield dataclasses.replace(outcome, scores=scores, curve=curve)


@contextlib.contextmanager
def _kept(store: Store) -> Iterator[None]:
    """One line about a store that disappears."""
    try:
        yield
    except OSError as error:
        if not Path(str(error.filename)).is_relative_to(store.root):
            raise
        found = f"{store.root} ({error.strerror})"
        refuse("store", found, "a directory that stays and can be written")


def _shared(graph: Graph) -> list[Step]:
    """What a group's trials need before they train, and the base that they are compared with."""
    first = parts(sft_of(graph))[0]
    inputs = [node for node in first.inputs.values() if isinstance(node, Step)]
    return [*inputs, graph.variants[0].evaluate]


def _ends(graph: Graph) -> Graph:
    """The base and the recovered adapter alone: a trial has no small inference."""
    return dataclasses.replace(graph, variants=(graph.variants[0], graph.variants[-1]))


if __name__ == "__main__":
    raise SystemExit(main())
