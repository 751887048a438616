"""A command's run: what a person sees of it, its run in MLflow, and a directory for its report."""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.assets import home
from pipelines.console import Console
from pipelines.execute import Event
from pipelines.recipe import Recipe, flat, write_recipe
from pipelines.step import Step, topological_order
from pipelines.store import Store
from pipelines.tracking import Tracking, local, viewer


@dataclass(frozen=True)
class Session:
    """name: of the run in MLflow and of its report. viewer: what to type to see it in MLflow."""

    name: str
    store: Store
    recipe: Recipe
    console: Console
    tracking: Tracking
    viewer: str

    def say(self, *things: Any, **options: Any) -> None:
        """Print for a person; options as of rich's `Console.print`."""
        self.console.terminal.print(*things, **options)

    def on(
        self,
        event: Event,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Show and note what happened to a step; params, tags: its own, as in `Tracking.on`."""
        self.console.on(event)
        self.tracking.on(event, params, tags)

    def noted(self, wanted: Iterable[tuple[Recipe, str, list[Step]]]) -> Callable[[Event], None]:
        """`on` for the steps of several recipes: with the params of one that needs the step.

        Args:
            wanted: recipes, each with its variant and what it is run for. A step that several
                variants need is of the variant `shared`.
        """
        known: dict[str, tuple[Recipe, str]] = {}
        for recipe, variant, targets in wanted:
            for step in topological_order(targets):
                first, owner = known.get(step.key, (recipe, variant))
                known[step.key] = first, variant if owner == variant else "shared"

        def on(event: Event) -> None:
            recipe, variant = known[event.step.key]
            self.on(event, flat(recipe), {"variant": variant})

        return on

    def report(self) -> Path:
        """The directory of the report, made, with the resolved recipe in it."""
        out = self.store.root / "reports" / self.name
        out.mkdir(parents=True)
        write_recipe(self.recipe, out / "recipe.json")
        return out


@contextmanager
def session(recipe: Recipe, store: Store, title: str, tags: Mapping[str, str]) -> Iterator[Session]:
    """Open the console and the run in MLflow; how the block ends is how the run ends.

    Args:
        title: the start of the run's name; the rest makes it unique.
        tags: of the run and of those nested in it, beside the recipe's name.
    """
    now = datetime.datetime.now(datetime.UTC)
    name = f"{title}-{now:%Y%m%dT%H%M%S}-{os.getpid()}"
    uri = recipe.tracking or local(home() / "mlflow")
    tracker = Tracking(
        uri,
        home() / "mlflow",
        params=flat(recipe),
        tags={"recipe": recipe.name, **tags},
        name=name,
        experiment=recipe.experiment,
    )
    with Console() as console, tracker as tracking:
        yield Session(name, store, recipe, console, tracking, viewer(uri))
