"""What a person sees while a pipeline runs: a line a step, and a bar for training."""

import json
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from loram.train import TrainConfig
from pipelines.execute import CURVE, Event

EVERY_S = 1.0  # a bar is brought up to date
LINE_EVERY_S = 30.0  # without a terminal: a line of progress


class Console:
    """Prints events, and follows `metrics.jsonl` of the training steps under way.

    On a terminal training has a bar with loss, tokens/s and time left; in a job's log a line now
    and then. Use as a context manager; give `on` to `execute`.
    """

    def __init__(self) -> None:
        self.terminal = Terminal(highlight=False)
        if not self.terminal.is_terminal:
            self.terminal.width = 140  # a log has no width of its own; the table needs this
        self.progress = Progress(
            TextColumn("  {task.description:12}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeLeft(),
            console=self.terminal,
            transient=True,
            disable=not self.terminal.is_terminal,
        )
        self.following: dict[str, tuple[TaskID, Path, str, int]] = {}
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Console":
        self.progress.start()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.progress.stop()

    def on(self, event: Event) -> None:
        """One line for the event; a bar from the start of a training step to its end."""
        step, name = event.step, event.step.name
        line = {
            "cached": "in the store",
            "started": "running",
            "waiting": "another run is making it; waiting",
            "damaged": f"entry refused, {event.text}; making it again",
            "finished": f"done in {event.seconds:.1f} s",
            "failed": f"failed after {event.seconds:.1f} s: {event.text}",
        }[event.kind]
        self.terminal.print(f"  {name:18} {step.key[:12]}  {line}", markup=False, soft_wrap=True)
        with self.lock:
            train = getattr(step.config, "train", step.config)
            if event.kind == "started" and isinstance(train, TrainConfig):
                task = self.progress.add_task(name, total=train.last, loss="-", speed="-")
                self.following[step.key] = task, event.path / CURVE, name, train.last
            elif event.kind in ("finished", "failed") and step.key in self.following:
                self.progress.remove_task(self.following.pop(step.key)[0])

    def _follow(self) -> None:
        said = time.monotonic()
        while not self.stopped.wait(EVERY_S):
            quiet = self.terminal.is_terminal or time.monotonic() - said < LINE_EVERY_S
            with self.lock:
                for task, path, name, total in self.following.values():
                    last = _last(path)
                    if not last:
                        continue
                    loss, speed = f"{last['loss']:.3f}", f"{last['tokens_per_second']:,.0f}"
                    self.progress.update(task, completed=last["step"], loss=loss, speed=speed)
                    if not quiet:
                        left = (total - last["step"]) * last["seconds"]
                        done = f"step {last['step']}/{total}  loss {loss}  {speed} tokens/s"
                        self.terminal.print(f"  {name:18} {done}  {left / 60:.1f} min left")
            if not quiet:
                said = time.monotonic()


def _last(path: Path) -> dict[str, Any]:
    """The last whole line of a step's curve that has a training loss."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # being written
        if "loss" in found:
            return dict(found)
    return {}
