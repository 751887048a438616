"""The main job: `python pipelines/full.py [RECIPE] [key=value ...] [--dry-run]`.

Also as a Ray job: `ray job submit --working-dir . -- python pipelines/full.py ...`. Nothing is
written relative to the working directory.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout that is not installed

from loram.plan import size  # noqa: E402
from pipelines import report, results  # noqa: E402
from pipelines.check import check, check_space  # noqa: E402
from pipelines.cluster import check_room, check_shared, start_ray  # noqa: E402
from pipelines.command import command, parsed  # noqa: E402
from pipelines.dry_run import dry_run  # noqa: E402
from pipelines.execute import CURVE, execute  # noqa: E402
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
    parser.add_argument("--dry-run", action="store_true", help="show the plan and run nothing")
    options = parsed(parser, words, "such as sft.lr=3e-4")

    def go() -> int:
        recipe = resolve(options.recipe, options.changes)
        store = Store.at(recipe.store)
        return dry_run(recipe, store) if options.dry_run else run(recipe, store)

    return command(go)


def run(recipe: Recipe, store: Store) -> int:
    """Check, execute, report."""
    config = check(recipe, store.root)
    model, sources = locate(recipe, store.root / "digests")
    recipe = replace(recipe, model=model.uri)  # of the hub, the commit
    graph = build(recipe, model, sources)
    targets = [variant.evaluate for variant in graph.variants] + [graph.recovered]
    check_space(store, recipe, config, targets)
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
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if lines and "loss" in lines[0]:  # a data step's curve counts rows
            curves[step.name] = lines  # of a training in parts the last has it whole
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
