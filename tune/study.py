"""A study: `python tune/study.py STUDY [RECIPE] [key=value ...] [--methods ...] [--seeds ...]`.

One of the paper's comparisons, for any recipe and any pruning: `steps`, perplexity over the steps
of SFT; `recovery`, with and without recovery and alignment; `ratio`, perplexity and score over the
pruning ratio; `cost`, tokens, seconds and memory. Also as a Ray job: `ray job submit
--working-dir . -- python tune/study.py ...`. What its trainings share is made once, what an
earlier study or run made is used, and the same command goes on where it was killed.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout that is not installed

from loram.errors import UserError  # noqa: E402
from loram.plan import size  # noqa: E402
from loram.prune import METHODS  # noqa: E402
from pipelines.check import check, check_hardware, check_space  # noqa: E402
from pipelines.cluster import check_room, check_shared, start_ray  # noqa: E402
from pipelines.command import command, parsed  # noqa: E402
from pipelines.execute import Event, StepFailed, execute  # noqa: E402
from pipelines.locate import locate  # noqa: E402
from pipelines.recipe import flat  # noqa: E402
from pipelines.session import Session, session  # noqa: E402
from pipelines.settings import check_settings  # noqa: E402
from pipelines.step import Step  # noqa: E402
from pipelines.store import Store  # noqa: E402
from tune import study_page, trainings  # noqa: E402
from tune.arms import RATIOS, STUDIES, Study, ask  # noqa: E402
from tune.points import Seen  # noqa: E402
from tune.rungs import anew, goes_on, going_on, parts  # noqa: E402
from tune.trainings import Training, evaluations, named, wanted  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="The paper's comparisons, one command each.")
    parser.add_argument("study", help=", ".join(STUDIES))
    parser.add_argument("--methods", nargs="*", default=METHODS, help=" ".join(METHODS))
    parser.add_argument("--seeds", nargs="*", default=["0"], help="of pruning and training (0)")
    parser.add_argument("--rates", nargs="*", help="tried for each method's own best sft.lr")
    default = " ".join(map(str, RATIOS))
    parser.add_argument("--ratios", nargs="*", help=f"of the study ratio ({default})")
    given = parsed(parser, words, "such as nf4=false")

    def go() -> int:
        lists = {name: getattr(given, name) for name in ("methods", "seeds", "rates", "ratios")}
        return run(ask(given.study, given.recipe, given.changes, **lists))

    return command(go)


def run(study: Study) -> int:
    """Check, train, evaluate, report."""
    recipe = study.recipe
    store = Store.at(recipe.store)
    config = check(study.arms[0].recipe, store.root)  # sources and servers are those of all
    for arm in study.arms:
        check_settings(arm.recipe, config)
        check_hardware(arm.recipe, config)
    model, sources = locate(recipe, store.root / "digests")
    recipe = replace(recipe, model=model.uri)  # of the hub, the commit
    planned = trainings.plan(study, model, sources)
    for training in planned:
        check_space(store, training.recipe, config, evaluations(study, [training]))
    methods = sorted({arm.recipe.prune.method for arm in study.arms if not arm.full})
    tags = {"study": study.name, "variant": ",".join(methods), "stage": "study"}
    with session(recipe, store, f"study-{study.name}-{recipe.name}", tags) as here:
        here.say(f"LoRAM study {study.name}: store {store.root}")
        start_ray()
        check_room(recipe.place, here.say)
        check_shared(recipe, store.root)
        lost = _train(study, planned, here)
        best = trainings.own_best(study, planned, lost, store)
        chosen = [t for t in planned if t.lr in (recipe.sft.lr, best[t.arm])]
        note = here.noted(wanted(study, chosen))
        _execute(evaluations(study, chosen), [], {}, note, here)
        points = trainings.observed(study, chosen, best, store, size(config))
        costs = trainings.spent(study, planned, lost, store)
        seen = Seen(study, points, costs, {arm.title: lr for arm, lr in best.items()}, lost)
        out = here.report()
        versions = store.record(planned[0].sft.slug)["libraries"]
        study_page.write(out, seen, flat(recipe), versions)
        here.tracking.scores(study_page.scores(seen))
        here.tracking.artifact(out, "report")
        here.say(study_page.table(seen))
        here.say(f"report  {out / 'report.html'}\nMLflow  {here.viewer}", soft_wrap=True)
    return 0


def _train(study: Study, planned: list[Training], here: Session) -> dict[str, str]:
    """Train rung by rung, and evaluate what was trained at the shared rate.

    Returns: why, of each training at another rate that failed: its rate is not chosen then.
    """
    lost: dict[str, str] = {}
    earlier: dict[str, Path] = {}
    note = here.noted(wanted(study, planned))
    for stop, following in zip(study.stops, [*study.stops[1:], None], strict=True):
        now = [t for t in planned if t.stop == stop and named(t) not in lost]
        shared = [t for t in now if t.lr == study.recipe.sft.lr]
        optional = [t for t in now if t not in shared]
        targets = [t.sft for t in now] + evaluations(study, shared)
        lost |= _execute(targets, optional, earlier, note, here)
        before = {(t.arm, t.seed, t.lr): t.sft for t in now if named(t) not in lost}
        earlier = {}
        for t in planned:
            stopped = before.get((t.arm, t.seed, t.lr))
            if t.stop == following and stopped:
                earlier |= goes_on(stopped, t.sft, here.store.entry(stopped.slug))
    return lost


def _execute(
    targets: list[Step],
    optional: list[Training],
    earlier: Mapping[str, Path],
    note: Callable[[Event], None],
    here: Session,
) -> dict[str, str]:
    """Make the targets side by side; without the `optional` trainings that fail.

    Returns: why, by the names of these.
    """
    lost: dict[str, str] = {}
    names = {step.key: named(t) for t in optional for step in (*parts(t.sft), *anew(t.sft))}

    def on(event: Event) -> None:
        if event.kind == "failed" and event.step.key in names:
            lost[names[event.step.key]] = event.text
        note(event)

    place = here.recipe.place
    # Each training that waits for its CPUs holds processes: one waits, so that none are idle.
    at_once = place.room and place.room + 1
    while True:
        before = len(lost)
        kept = [step for step in targets if names.get(step.key) not in lost]
        try:
            execute(kept, here.store, partial(going_on, earlier), place, on, at_once)
            return lost
        except (UserError, StepFailed):
            if len(lost) == before:
                raise


if __name__ == "__main__":
    raise SystemExit(main())
