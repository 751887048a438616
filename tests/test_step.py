"""Keys, the checks made when a graph is built, and the executor, with toy steps in threads."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loram.errors import UserError, refuse
from pipelines.execute import Event, Launch, StepFailed, execute, run
from pipelines.step import Metrics, Source, Step, topological_order
from pipelines.store import Store


@dataclasses.dataclass(frozen=True)
class Config:
    text: str = "a"
    lr: float = 1e-3
    seconds: float = 0.0
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Odd:
    value: Any


def write(config: Config, *, out: Path, work: Path, place: Any) -> Metrics:
    time.sleep(config.seconds)
    (out / "text").write_text(config.text)
    return {"length": len(config.text)}


def join(config: Config, *, out: Path, work: Path, place: Any, **parts: Path | str) -> Metrics:
    texts = [p if isinstance(p, str) else (p / "text").read_text() for p in parts.values()]
    (out / "text").write_text(config.text.join(texts))
    return {"parts": len(parts), "loss": float("nan")}


def fail(config: Config, *, out: Path, work: Path, place: Any) -> Metrics:
    (out / "half").write_text("half")
    (work / "checkpoint").write_text("kept")
    raise ValueError("lost")


def refuse_it(config: Config, *, out: Path, work: Path, place: Any) -> Metrics:
    refuse("source", "nothing", "rows")


def fill_disk(config: Config, *, out: Path, work: Path, place: Any) -> Metrics:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    return {}


def resume(config: Config, *, out: Path, work: Path, place: Any) -> Metrics:
    first = not (work / "checkpoint").exists()
    (work / "checkpoint").write_text("x")
    with (work / "metrics.jsonl").open("a") as curve:
        curve.write('{"step": 1, "loss": 2.0}\n')
    if first:
        raise ValueError("first attempt")
    return {}


def meet(config: Config, *, out: Path, work: Path, place: threading.Barrier) -> Metrics:
    place.wait(timeout=10)
    return {}


def graph(lr: float = 1e-3) -> dict[str, Step]:
    a = Step("a", write, Config("a"), {})
    b = Step("b", write, Config("b"))
    base = Step("base", join, Config("+"), {"a": a, "b": b, "c": Source("corpus", "URI", "1234")})
    sft = Step("sft", join, Config("-", lr=lr), {"base": base})
    return {"a": a, "b": b, "base": base, "sft": sft, "score": Step("score", join, Config("!"),
            {"sft": sft, "base": base})}  # fmt: skip


@pytest.fixture
def launch() -> Iterator[Launch]:
    with ThreadPoolExecutor(8) as pool:
        yield lambda *what: pool.submit(run, *what)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def go(target: Step, store: Store, launch: Launch, place: Any = None) -> list[str]:
    """Execute and return the events as words."""
    events: list[Event] = []
    execute([target], store, launch, place, events.append)
    return [f"{event.kind} {event.step.name}" for event in events]


def test_key_is_equal_in_another_process() -> None:
    code = "from tests.test_step import graph; print(graph()['score'].key)"
    env = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert other.stdout.strip() == graph()["score"].key, other.stderr


def test_key_is_made_of_name_version_config_and_inputs() -> None:
    step = Step("a", write, Config("x"), {})
    changed = [
        dataclasses.replace(step, name="b"),
        dataclasses.replace(step, version=2),
        dataclasses.replace(step, config=Config("y")),
        Step("a", join, Config("x"), {"one": Source("s", "URI", "1")}),
        Step("a", join, Config("x"), {"two": Source("s", "URI", "1")}),
        Step("a", join, Config("x"), {"two": Source("s", "URI", "2")}),
    ]
    assert len({each.key for each in (step, *changed)}) == 7
    assert step.key == dataclasses.replace(step, cpus=4, gpus=1).key
    two = {"a": Source("s", "URI", "1"), "b": step}
    backwards = Step("j", join, Config(), dict(reversed(two.items())))
    assert Step("j", join, Config(), two).key == backwards.key
    assert Source("s", "here", "1").key == Source("t", "there", "1").key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1}, {1: 2}, b"x", print])
def test_value_without_one_json_form_is_refused_with_its_field(value: object) -> None:
    with pytest.raises(TypeError, match=r"step 'a': config.value.*has no one JSON form"):
        Step("a", lambda config, out, work, place: {}, Odd(value))


def test_function_that_does_not_accept_its_inputs_is_refused() -> None:
    source = Source("s", "URI", "1")
    with pytest.raises(TypeError, match="step 'a': write: got an unexpected keyword argument 's'"):
        Step("a", write, Config(), {"s": source})
    with pytest.raises(TypeError, match="missing a required argument: 'pruned'"):
        Step("a", lambda config, pruned, out, work, place: {}, Config())
    with pytest.raises(TypeError, match="config is no Config"):
        Step("a", write, Odd(1))
    with pytest.raises(TypeError, match="no names of inputs"):
        Step("a", join, Config(), {"out": source})
    with pytest.raises(TypeError, match="a name is made of"):
        Step("a/b", write, Config())


def test_order_is_topological_and_without_doubles() -> None:
    steps, twin = graph(), graph()
    names = [step.name for step in topological_order([steps["score"], twin["sft"], steps["a"]])]
    assert names == ["a", "b", "base", "sft", "score"]


def test_inputs_arrive_and_the_record_says_what_was_done(store: Store, launch: Launch) -> None:
    steps = graph()
    done = execute([steps["score"]], store, launch, None, lambda event: None)
    assert (done[steps["score"].key] / "text").read_text() == "a+b+URI!a+b+URI"
    record = store.record(steps["sft"].slug)
    assert record["config"]["lr"] == 1e-3 and record["inputs"] == {"base": steps["base"].key}
    assert record["metrics"] == {"parts": 1, "loss": "nan"}
    assert record["libraries"]["torch"] and record["files"]["text"]["size"] == 7


def test_changed_lr_runs_only_downstream(store: Store, launch: Launch) -> None:
    assert len(go(graph()["score"], store, launch)) == 10
    assert go(graph()["score"], store, launch) == ["cached score"]
    events = go(graph(lr=3e-4)["score"], store, launch)
    assert events == [
        "cached base",
        "started sft",
        "finished sft",
        "started score",
        "finished score",
    ]


def test_what_only_made_a_finished_entry_is_not_needed(store: Store, launch: Launch) -> None:
    steps = graph()
    go(steps["score"], store, launch)
    store.discard(steps["base"].slug)
    assert go(steps["score"], store, launch) == ["cached score"]
    assert "started base" in go(graph(lr=1.0)["score"], store, launch)


def test_independent_steps_run_side_by_side(store: Store, launch: Launch) -> None:
    a, b = (Step(name, meet, Config()) for name in "ab")
    both = Step("both", lambda config, a, b, out, work, place: {}, Config(), {"a": a, "b": b})
    assert go(both, store, launch, threading.Barrier(2))[:2] == ["started a", "started b"]


def test_failure_lets_the_others_finish_and_starts_nothing(store: Store, launch: Launch) -> None:
    slow = Step("slow", write, Config(seconds=0.5))
    bad = Step("bad", fail, Config())
    after = Step("after", join, Config(), {"slow": slow})
    end = Step("end", join, Config(), {"bad": bad, "after": after})
    events: list[Event] = []
    with pytest.raises(StepFailed, match="step bad: ValueError: lost") as caught:
        execute([end], store, launch, None, events.append)
    assert isinstance(caught.value.__cause__, ValueError)
    words = [f"{event.kind} {event.step.name}" for event in events]
    assert sorted(words[:2]) == ["started bad", "started slow"]
    assert words[2:] == ["failed bad", "finished slow"]
    assert store.slugs() == [slow.slug]
    assert not list((store.root / "partial").iterdir())
    assert (store.work(bad.slug) / "checkpoint").read_text() == "kept"


def test_second_attempt_finds_its_work_and_leaves_none(store: Store, launch: Launch) -> None:
    step = Step("a", resume, Config())
    with pytest.raises(StepFailed, match="first attempt"):
        go(step, store, launch)
    assert go(step, store, launch) == ["started a", "finished a"]
    assert (store.entry(step.slug) / "metrics.jsonl").read_text().count("\n") == 2
    assert not store.work(step.slug).exists()


def test_a_second_attempt_waits_for_the_first(tmp_path: Path) -> None:
    """As when a killed driver's task lives on while the same command runs again."""
    step, spans = Step("a", write, Config(seconds=0.5)), []

    def attempt(name: str) -> None:
        run(step, {}, tmp_path / name, tmp_path / "work", None)
        spans.append(time.monotonic())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attempt, "ab"))
    assert spans[1] - spans[0] >= 0.5


def test_users_mistake_in_a_step_reaches_the_user_as_it_is(store: Store, launch: Launch) -> None:
    with pytest.raises(UserError, match=r"^source: found nothing; accepted: rows$"):
        go(Step("a", refuse_it, Config()), store, launch)


def test_full_disk_is_one_line_and_leaves_nothing(store: Store, launch: Launch) -> None:
    step = Step("a", fill_disk, Config())
    with pytest.raises(UserError, match=r"^store: found no space left .* in step a; accepted: .*$"):
        go(step, store, launch)
    assert not store.slugs() and not list((store.root / "partial").iterdir())
