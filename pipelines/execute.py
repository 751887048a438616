"""Run a graph: each step once, independent ones side by side. No Ray in it."""

import datetime
import errno
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loram.errors import UserError
from pipelines.lock import Lock, wait_lock
from pipelines.seal import seal
from pipelines.step import Metrics, Step, topological_order
from pipelines.store import Store

POLL_S = 0.3  # how often a step that another run is making is looked at again
CURVE = "metrics.jsonl"

Launch = Callable[[Step, dict[str, Any], Path, Path, Any], "Future[Metrics]"]


class StepFailed(Exception):
    """A step raised something that is no mistake of the user's; it is the `__cause__`."""


@dataclass(frozen=True)
class Event:
    """Something happened to a step.

    cached: its entry was there. started: `path` is its work directory. waiting: another run is
    making it. damaged: its entry was refused, for `text`, and is made again. finished: `path` is
    its entry, `metrics` its result. failed: `text` says why.
    """

    kind: Literal["cached", "started", "waiting", "damaged", "finished", "failed"]
    step: Step
    path: Path
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    text: str = ""


def run(step: Step, inputs: dict[str, Any], out: Path, work: Path, place: Any) -> Metrics:
    """Call the step's function and seal what it wrote; runs where the launcher puts it.

    A second attempt after a lost worker finds `out` empty again and `work` as it was; it waits for
    the first, which may outlive its driver for a while. Metrics that are no finite number are
    recorded as strings.
    """
    with wait_lock(work / "step.lock"):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        started, since = datetime.datetime.now(datetime.UTC), time.monotonic()
        found = step.fn(step.config, **inputs, out=out, work=work, place=place)
        metrics = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in found.items()
        }
        if (work / CURVE).exists():
            shutil.copyfile(work / CURVE, out / CURVE)
        about = {
            "key": step.key,
            **step.identity,
            "metrics": metrics,
            "seconds": round(time.monotonic() - since, 3),
            "started": started.isoformat(timespec="seconds"),
            "host": socket.gethostname(),
        }
        seal(out, about)
        return metrics


def execute(
    targets: Iterable[Step],
    store: Store,
    launch: Launch,
    place: Any,
    on_event: Callable[[Event], None],
    at_once: int | None = None,
) -> dict[str, Path]:
    """Make the targets' entries, and of the other steps only those that these need.

    A step that another run is making is waited for. Every entry in use stays locked against
    removal until the end.

    Args:
        launch: starts `run(step, inputs, out, work, place)` somewhere and returns its Future.
        on_event: told of everything that happens, in this thread.
        at_once: steps under way at a time; None for all whose inputs are there.

    Returns: the directories of all steps that were used or made, by key.

    Raises:
        UserError: a step found a mistake of the user's, the disk is full, or an entry cannot be
            read.
        StepFailed: a step raised anything else. After a step's failure those in flight were allowed
            to finish, and nothing new was started.
    """
    targets = list(targets)
    ordered = topological_order(targets)
    needed = {step.key for step in targets}
    absent: set[str] = set()  # needed and not in the store
    waiting: set[str] = set()
    done: dict[str, Path] = {}
    locks: dict[str, Lock] = {}
    running: dict[Future[Metrics], tuple[Step, Path, float]] = {}

    def adopt(step: Step) -> None:
        done[step.key] = store.entry(step.slug)
        store.touch(step.slug)
        on_event(Event("cached", step, done[step.key]))

    def look(step: Step) -> None:
        """Use the entry if it is there; need the inputs if it is not."""
        lock = store.lock(step.slug, shared=True)
        if lock:
            locks[step.key] = lock
            flaw = store.flaw(step.slug, step.key)
            if not flaw:
                return adopt(step)
            locks.pop(step.key).release()
            if flaw != "missing" and step.key not in waiting:
                on_event(Event("damaged", step, store.entry(step.slug), text=flaw))
        absent.add(step.key)
        needed.update(_inputs(step))

    def begin(step: Step) -> bool:
        """Start the step; false if another run has its entry in hand."""
        lock = store.lock(step.slug)
        if lock is None:
            if step.key not in waiting:
                waiting.add(step.key)
                on_event(Event("waiting", step, store.entry(step.slug)))
            absent.discard(step.key)  # look again: who made it holds it, shared, to its own end
            return False
        locks[step.key] = lock
        if not store.flaw(step.slug, step.key):  # the other run was faster
            lock.share()
            adopt(step)
            return True
        given: dict[str, Any] = {
            name: done[node.key] if isinstance(node, Step) else node.uri
            for name, node in step.inputs.items()
        }
        out, work = store.begin(step.slug), store.work(step.slug)
        on_event(Event("started", step, work))
        running[launch(step, given, out, work, place)] = step, out, time.monotonic()
        return True

    def finish(future: "Future[Metrics]") -> Exception | None:
        step, out, since = running.pop(future)
        seconds = time.monotonic() - since
        try:
            metrics = future.result()
            done[step.key] = store.commit(step.slug, out)
        except Exception as error:
            shutil.rmtree(out, ignore_errors=True)
            locks.pop(step.key).release()
            failure = _explain(step, error, store.root)
            on_event(Event("failed", step, store.work(step.slug), seconds, text=str(failure)))
            return failure
        locks[step.key].share()
        on_event(Event("finished", step, done[step.key], seconds, metrics))
        return None

    failure: Exception | None = None
    try:
        while True:
            held_up = False
            if failure is None:
                for step in reversed(ordered):
                    if step.key in needed - absent - done.keys():
                        look(step)
                busy = {step.key for step, _, _ in running.values()}
                for step in ordered:
                    if at_once and len(running) >= at_once:
                        break
                    if step.key in absent - done.keys() - busy and _inputs(step) <= done.keys():
                        held_up |= not begin(step)
            if not running and not held_up:
                break
            if not running:
                time.sleep(POLL_S)
            finished, _ = wait(running, POLL_S if held_up else None, FIRST_COMPLETED)
            for future in finished:
                trouble = finish(future)
                failure = failure or trouble
    finally:
        for future in running:
            future.cancel()
        for lock in locks.values():
            lock.release()
    if failure:
        raise failure
    return done


def _inputs(step: Step) -> set[str]:
    return {node.key for node in step.inputs.values() if isinstance(node, Step)}


def _explain(step: Step, error: Exception, root: Path) -> Exception:
    if isinstance(error, UserError):
        return error
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or "No space left on device" in str(error):
        return UserError(
            f"store: found no space left at {root} in step {step.name}; accepted: a disk with room"
        )
    lines = str(error).strip().splitlines() or [""]
    said = lines[-1 if "Traceback" in str(error) else 0]
    failure = StepFailed(f"step {step.name}: {type(error).__name__}: {said}")
    failure.__cause__ = error
    return failure
