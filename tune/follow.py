"""What a person and MLflow see of the trials while they run."""

import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipelines.recipe import Recipe, flat
from pipelines.step import Metrics
from pipelines.tracking import Tracking
from tune.notes import Notes
from tune.search import Outcome
from tune.space import Value, replaced

EVERY_S = 1.0


class Follow:
    """Follows the notes of one group's trials; a context manager around their search.

    A trial's run in MLflow is open from its first note until `finish`.

    Args:
        group: the values that all its trials have.
        recipe: without them.
        key: that of the training of a recipe.
    """

    def __init__(
        self,
        notes: Notes,
        tracking: Tracking,
        sweep: str,
        group: dict[str, Value],
        recipe: Recipe,
        key: Callable[[Recipe], str],
        say: Callable[..., None],
    ) -> None:
        self.notes, self.tracking, self.sweep = notes, tracking, sweep
        self.group, self.recipe, self.key, self.say = group, recipe, key, say
        self.at = notes.file.stat().st_size  # after those of an earlier driver
        self.open: set[str] = set()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Follow":
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.thread.join()

    def finish(self, outcome: Outcome) -> None:
        """Close the trial's run with its scores and the curve of its training."""
        self._begin(outcome.name, outcome.values)
        metrics: Metrics = {**outcome.scores}
        if not outcome.error:
            metrics["steps_trained"] = outcome.step
            metrics["key"] = self.key(outcome.recipe)  # of what was trained, also if it was stopped
        if math.isfinite(outcome.held_out_loss):
            metrics["held_out_loss"] = outcome.held_out_loss
        self.tracking.finish(outcome.name, metrics, outcome.curve, outcome.error)

    def _follow(self) -> None:
        last = False
        while not last:
            last = self.stopped.wait(EVERY_S)
            for note, end in self.notes.read(self.at):
                self.at = end
                if "trial" in note:
                    self._say(note)

    def _say(self, note: dict[str, Any]) -> None:
        self._begin(note["trial"], self.group | note["values"])
        text = "running"
        if "step" in note:
            text = note["error"] or f"step {note['step']}  held-out {note['held_out_loss']:.4f}"
        self.say(f"  trial {note['trial']:12} {shown(note['values'])}  {text}", markup=False)

    def _begin(self, name: str, values: dict[str, Value]) -> None:
        if name not in self.open:
            self.open.add(name)
            recipe = replaced(self.recipe, values)
            tags = {
                "sweep": self.sweep,
                "trial": name,  # as in the table
                "stage": "trial",
                "variant": recipe.prune.method,
                "key": self.key(recipe),
            }
            self.tracking.begin(name, shown(values) or name, flat(recipe), tags)


def shown(values: dict[str, Value]) -> str:
    """The values on one line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
    )
