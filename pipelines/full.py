"""The main job: `python pipelines/full.py [RECIPE] [key=value ...] [--dry-run]`.

Also as a Ray job: `ray job submit --working-dir . -- python pipelines/full.py ...`. Nothing is
written relative to the working directory.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout that is not installed

from huggingface_hub.utils import disable_progress_bars  # noqa: E402

from loram.errors import UserError  # noqa: E402
from loram.plan import size  # noqa: E402
from pipelines import report, results  # noqa: E402
from pipelines.check import check  # noqa: E402
from pipelines.cluster import check_room, check_shared, start_ray  # noqa: E402
from pipelines.dry_run import dry_run  # noqa: E402
from pipelines.execute import CURVE, StepFailed, execute  # noqa: E402
from pipelines.graph import Graph, build  # noqa: E402
from pipelines.launch import ray_launch  # noqa: E402
from pipelines.locate import locate  # noqa: E402
from pipelines.recipe import Recipe, flat  # noqa: E402
from pipelines.recipes import resolve  # noqa: E402
from pipelines.session import session  # noqa: E402
from pipelines.step import Step, topological_order  # noqa: E402
from pipelines.store import Store  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description="LoRAM, from a full model to a recovered adapter.")
    parser.add_argument("recipe", nargs="?", default="small", help="a name, or a recipe.json")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="such as sft.lr=3e-4")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and run nothing")
    options = parser.parse_intermixed_args(words)
    if "=" in options.recipe:
        options.recipe, options.changes = "small", [options.recipe, *options.changes]

    def go() -> int:
        recipe = resolve(options.recipe, options.changes)
        store = Store.at(recipe.store)
        return dry_run(recipe, store) if options.dry_run else run(recipe, store)

    return command(go)


def command(go: Callable[[], int]) -> int:
    """Run a command quietly; a failure becomes one line and an exit status."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"} | os.environ
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        return go()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def run(recipe: Recipe, store: Store) -> int:
    """Check, execute, report."""
    config = check(recipe, store.root)
    model, sources = locate(recipe, store.root / "digests")
    recipe = replace(recipe, model=model.uri)  # of the hub, the commit
    graph = build(recipe, model, sources)
    targets = [variant.evaluate for variant in graph.variants] + [graph.recovered]
    tags = {"variant": recipe.prune.method, "stage": "pipeline"}
    with session(recipe, store, recipe.name, tags) as here:
        here.say(f"LoRAM {recipe.name}: store {store.root}")
        start_ray()
        check_room(recipe.place, here.say)
        check_shared(recipe, store.root)
        execute(targets, store, ray_launch, recipe.place, here.on)
        rows = results.rows(graph, store, size(config))
        out = here.report()
        _write_report(out, graph, targets, store, recipe, rows)
        here.tracking.scores(results.headline(rows))
        here.tracking.artifact(out, "report")
        here.tracking.artifact(store.entry(graph.recovered.slug), "adapter")
        here.tracking.artifact(store.entry(graph.pruned.slug) / "kept.safetensors", "kept")
        for step in topological_order(targets):
            rejects = store.entry(step.slug) / "rejects.jsonl"
            if rejects.exists() and rejects.stat().st_size:
                here.tracking.artifact(rejects, f"rejects/{step.name}")
        here.say(report.table(rows, f"LoRAM {recipe.name}"))
        here.say(
            f"recovered adapter  {store.entry(graph.recovered.slug)}\n"
            f"report             {out / 'report.html'}\n"
            f"run it again       python pipelines/full.py {out / 'recipe.json'}\n"
            f"MLflow             {here.viewer}",
            soft_wrap=True,
        )
    return 0


def _write_report(
    out: Path, graph: Graph, targets: list[Step], store: Store, recipe: Recipe, rows: list
) -> None:
    known = [store.known(step.slug) for step in topological_order(targets)]
    records = [record for record in known if record]
    curves = {}
    for step in topological_order(targets):
        path = store.entry(step.slug) / CURVE
        if path.exists():
            # Of a training in parts the last has it whole.
            curves[step.name] = [json.loads(line) for line in path.read_text().splitlines()]
    report.write(
        out,
        rows,
        curves,
        records,
        flat(recipe),
        records[0]["libraries"],
    )


if __name__ == "__main__":
    raise SystemExit(main())
