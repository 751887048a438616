"""Tracking servers, drivers and senders that are killed while a run is on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from loram.errors import UserError
from pipelines.execute import execute, run
from pipelines.sender import flush
from pipelines.step import Metrics, Step
from pipelines.store import Store
from pipelines.tracking import Tracking, check, local

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Config:
    points: int = 300


def train(config: Config, *, out: Path, work: Path, place: Path) -> Metrics:
    """A point every 20 ms; the last comes when the file `place` is there."""
    with (work / "metrics.jsonl").open("a", buffering=1) as curve:
        for step in range(1, config.points + 1):
            while step == config.points and not place.exists():
                time.sleep(0.02)
            curve.write(json.dumps({"step": step, "time": time.time(), "loss": 1 / step}) + "\n")
            time.sleep(0.02)
    return {"rows": 7}


def drive(uri: str, root: Path, last: Path, patience_s: float) -> None:
    with Tracking(
        uri, root, params={"sft.lr": 1}, tags={}, name="pipeline", patience_s=patience_s
    ) as tracking:
        with ThreadPoolExecutor(1) as pool:
            steps = [Step("sft", train, Config())]
            store = Store(root / "store")
            execute(steps, store, lambda *what: pool.submit(run, *what), last, tracking.on)
        tracking.artifact(Path(__file__))


@contextmanager
def driver(uri: str, root: Path, last: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`drive` in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.test_tracking_kill import drive; "
        "drive(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), 20.0)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code, uri, str(root), str(last)], env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def server(folder: Path, port: int, database: str = "server.db") -> Iterator[str]:
    """A real server; at the end of the block it is killed with all its workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        + ["--backend-store-uri", f"sqlite:///{folder}/{database}", "--workers", "1"]
        + ["--artifacts-destination", str(folder / "served")],
        env=os.environ | {"DO_NOT_TRACK": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        until(lambda: answers(uri))
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(uri: str) -> bool:
    try:
        check(uri)
    except UserError:
        return False
    return True


def until(true: Callable[[], Any], limit_s: float = 240) -> Any:
    end = time.monotonic() + limit_s
    while not (value := true()):
        assert time.monotonic() < end, "never came true"
        time.sleep(0.1)
    return value


def found(uri: str) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("loram")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    assert len({one.info.run_name for one in runs}) == len(runs), "a run was made twice"
    return {one.info.run_name: one for one in runs}


def steps_sent(uri: str) -> list[int]:
    runs = found(uri)
    if "sft" not in runs:
        return []
    history = MlflowClient(tracking_uri=uri).get_metric_history(runs["sft"].info.run_id, "loss")
    return [point.step for point in history]


def begun(root: Path) -> bool:
    """Whether a sender has made the store, so that this process can look without making it too."""
    return bool(list(root.glob("unsent/*/state.json")))


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_server_killed_in_mid_run_misses_nothing(tmp_path: Path, port: int) -> None:
    last = tmp_path / "last"
    with ThreadPoolExecutor(1) as pool:
        with server(tmp_path, port) as uri:
            driving = pool.submit(drive, uri, tmp_path / "home", last, 60.0)
            until(lambda: steps_sent(uri))
        time.sleep(3)
        with server(tmp_path, port) as uri:
            last.touch()
            driving.result()
            assert steps_sent(uri) == list(range(1, 301))
            runs = found(uri)
            assert {one.info.status for one in runs.values()} == {"FINISHED"}
            assert runs["sft"].data.metrics["rows"] == 7
            files = MlflowClient(tracking_uri=uri).list_artifacts(runs["pipeline"].info.run_id)
            assert [file.path for file in files] == [Path(__file__).name]


def test_server_that_stays_away_gets_all_later(
    tmp_path: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    last, home = tmp_path / "last", tmp_path / "home"
    with ThreadPoolExecutor(1) as pool:
        with server(tmp_path, port) as uri:
            driving = pool.submit(drive, uri, home, last, 3.0)
            until(lambda: steps_sent(uri))
        last.touch()
        driving.result()
    said = capfd.readouterr().err
    assert said.count(f"{uri} is away, its messages are kept") == 1
    assert f"3 messages not sent to {uri}: the next run does, or" in said
    assert not flush(home, None)
    with server(tmp_path, port) as uri:
        assert flush(home, None)
        assert steps_sent(uri) == list(range(1, 301))
        assert {one.info.status for one in found(uri).values()} == {"FINISHED"}
    assert not list((home / "unsent").iterdir())


def test_killed_driver_leaves_no_run_open(tmp_path: Path) -> None:
    uri = local(tmp_path)
    with driver(uri, tmp_path, tmp_path / "never") as process:
        until(lambda: begun(tmp_path) and len(steps_sent(uri)) > 50)
        process.kill()
    until(lambda: {one.info.status for one in found(uri).values()} == {"KILLED"})
    until(lambda: not list((tmp_path / "unsent").iterdir()))
    curve = next((tmp_path / "store" / "work").glob("*/metrics.jsonl"))
    assert steps_sent(uri) == [json.loads(line)["step"] for line in curve.read_text().splitlines()]


def test_killed_sender_is_replaced_and_both_killed_are_closed_by_the_next_run(
    tmp_path: Path,
) -> None:
    uri = local(tmp_path)
    with driver(uri, tmp_path, tmp_path / "last") as process:
        sender = until(lambda: children(process.pid))[0]
        until(lambda: begun(tmp_path) and steps_sent(uri))
        os.kill(sender, signal.SIGKILL)
        (tmp_path / "last").touch()
        assert process.wait(120) == 0
    assert steps_sent(uri) == list(range(1, 301))
    assert {one.info.status for one in found(uri).values()} == {"FINISHED"}

    later = local(tmp_path / "two")
    with driver(later, tmp_path / "two", tmp_path / "never") as process:
        sender = until(lambda: children(process.pid))[0]
        until(lambda: begun(tmp_path / "two") and steps_sent(later))
        process.kill()
        os.kill(sender, signal.SIGKILL)
    assert {one.info.status for one in found(later).values()} == {"RUNNING"}
    with Tracking(later, tmp_path / "two", params={}, tags={}, name="next"):
        until(lambda: found(later)["sft"].info.status == "KILLED")
    assert [found(later)[name].info.status for name in ("pipeline", "next")] == [
        "KILLED",
        "FINISHED",
    ]


def test_two_drivers_create_one_store(tmp_path: Path) -> None:
    def one(number: int) -> None:
        root, uri = tmp_path / "home", local(tmp_path / "home")
        with Tracking(uri, root, params={}, tags={}, name=f"run {number}"):
            pass

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    assert {n: r.info.status for n, r in found(local(tmp_path / "home")).items()} == {
        f"run {number}": "FINISHED" for number in range(3)
    }


def children(parent: int) -> list[int]:
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in text.split()]
