"""SIGKILL of a driver, and of the worker of a step, on real Ray."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from loram.errors import UserError, refuse
from pipelines.cluster import start_ray
from pipelines.execute import Event, StepFailed, execute
from pipelines.launch import ray_launch
from pipelines.step import Metrics, Step
from pipelines.store import Store

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Config:
    turns: int = 20
    fault: str = ""


def count(config: Config, *, out: Path, work: Path, place: Path, **inputs: Path) -> Metrics:
    """Count to `turns`, a checkpoint a turn; a line at `place` for each turn, by any attempt."""
    checkpoint = work / "turn"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for turn in range(first, config.turns):
        with place.open("a") as file:
            file.write(f"{out.name.partition('-')[0]} {turn} {os.getpid()}\n")
        time.sleep(0.05)
        draft = work / "draft"
        draft.write_text(str(turn + 1))
        draft.replace(checkpoint)
    if config.fault == "user":
        refuse("source", "nothing", "rows")
    if config.fault == "other":
        raise ValueError("lost")
    (out / "turns").write_text(str(config.turns))
    return {"turns": config.turns}


def graph() -> Step:
    first = Step("first", count, Config())
    left = Step("left", count, Config(), {"first": first})
    right = Step("right", count, Config(turns=15), {"first": first})
    return Step("last", count, Config(turns=5), {"left": left, "right": right})


def drive(root: Path, place: Path) -> None:
    start_ray()

    def told(event: Event) -> None:
        print(event.kind, event.step.name, flush=True)

    execute([graph()], Store(root), ray_launch, place, told)


def run_driver(root: Path, place: Path, kill: Callable[[], bool]) -> list[str]:
    """What a driver says, started outside the repository and killed once `kill()` is true."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); "
        "from pathlib import Path; from tests.test_store_kill import drive; "
        "drive(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    with (root.parent / "said").open("w+") as said:
        driver = subprocess.Popen(
            [sys.executable, "-c", code, root, place], stdout=said, cwd=root.parent
        )
        while driver.poll() is None and not kill():
            time.sleep(0.01)
        driver.kill()
        driver.wait()
        said.seek(0)
        return said.read().splitlines()


def lines(place: Path) -> list[str]:
    return place.read_text().splitlines() if place.exists() else []


def wait_for_lines(place: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(lines(place)) < count:
        assert time.monotonic() < end, "the step does not run"
        time.sleep(0.01)


def test_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    """Every step is finished once, and of each at most one turn is done again a kill."""
    place, root = tmp_path / "place", tmp_path / "store"
    choose = random.Random(time.time_ns())
    finished: list[str] = []
    for _ in range(2):
        done = len(lines(place)) + choose.randrange(5, 25)
        print("killed after", done, "turns")
        said = run_driver(root, place, lambda done=done: len(lines(place)) >= done)
        finished += [line for line in said if line.startswith("finished")]
        store = Store(root)
        for slug in store.slugs():
            assert not store.flaw(slug, store.record(slug)["key"])
    said = run_driver(root, place, lambda: False)
    finished += [line for line in said if line.startswith("finished")]
    assert sorted(finished) == [f"finished {name}" for name in ("first", "last", "left", "right")]
    turns = [tuple(line.split()[:2]) for line in lines(place)]
    assert len(set(turns)) == 20 + 20 + 15 + 5
    assert len(turns) <= 60 + 2 * 2, "finished turns were done again"
    assert len(list(root.glob("*/record.json"))) == 4
    assert not list((root / "work").iterdir())
    assert not list((root / "partial").iterdir())


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[None]:
    start_ray()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a task cannot import this
    yield
    ray.shutdown()


def test_killed_worker_is_replaced_and_goes_on(tmp_path: Path, embedded_ray: None) -> None:
    place, store = tmp_path / "place", Store(tmp_path / "store")
    step = Step("first", count, Config())

    def kill() -> int:
        wait_for_lines(place, 7)
        victim = int(lines(place)[-1].split()[2])
        os.kill(victim, signal.SIGKILL)
        return victim

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        done = execute([step], store, ray_launch, place, lambda event: None)
    assert (done[step.key] / "turns").read_text() == "20"
    workers = [int(line.split()[2]) for line in lines(place)]
    assert killing.result() in workers
    assert workers[-1] != killing.result()
    assert len(workers) <= 21, "the second attempt began anew"


def test_what_a_task_raises_arrives_bare(tmp_path: Path, embedded_ray: None) -> None:
    place, store = tmp_path / "place", Store(tmp_path / "store")
    step = Step("first", count, Config(1, "user"))
    with pytest.raises(UserError, match=r"^source: found nothing; accepted: rows$"):
        execute([step], store, ray_launch, place, lambda event: None)
    step = Step("first", count, Config(1, "other"))
    with pytest.raises(StepFailed, match=r"^step first: ValueError: lost$") as caught:
        execute([step], store, ray_launch, place, lambda event: None)
    assert type(caught.value.__cause__) is ValueError


def test_ctrl_c_ends_the_tasks(tmp_path: Path, embedded_ray: None) -> None:
    place, store = tmp_path / "place", Store(tmp_path / "store")
    step = Step("first", count, Config(turns=1000))

    def interrupt() -> None:
        wait_for_lines(place, 1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute([step], store, ray_launch, place, lambda event: None)
    worker = int(lines(place)[0].split()[2])
    end = time.monotonic() + 20
    while psutil.pid_exists(worker):
        assert time.monotonic() < end, "the task still runs"
        time.sleep(0.1)
    assert store.slugs() == []
