"""MLflow as the user finds it afterwards, in real SQLite stores."""

import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from mlflow import MlflowClient

from loram.errors import UserError
from pipelines.execute import StepFailed, execute, run
from pipelines.step import Metrics, Step
from pipelines.store import Store
from pipelines.tracking import Tracking, check, local


@dataclass(frozen=True)
class Config:
    points: int = 3
    error: str = ""


def train(config: Config, *, out: Path, work: Path, place: Any, **inputs: Path) -> Metrics:
    """A curve with points 1, 2, ..., as training writes it."""
    with (work / "metrics.jsonl").open("a") as curve:
        for step in range(1, config.points + 1):
            row = {"step": step, "time": 1.7e9 + step, "loss": 1 / step, "lr": 0.1}
            curve.write(json.dumps(row) + "\n")
    if config.error:
        raise ValueError(config.error)
    return {"loss": 0.25, "rows": 7, "unit": "nats"}


def go(tracking: Tracking, store: Store, *steps: Step) -> None:
    with ThreadPoolExecutor(2) as pool:
        execute(steps, store, lambda *what: pool.submit(run, *what), None, tracking.on)


def found(root: Path, name: str = "loram") -> dict[str, Any]:
    """All runs of an experiment, by their name."""
    experiment = client(root).get_experiment_by_name(name)
    assert experiment is not None
    runs = client(root).search_runs([experiment.experiment_id])
    return {one.info.run_name: one for one in runs}


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=local(root))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests here, since making the tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def test_a_pipeline_and_the_steps_that_ran(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    prune = Step("prune", train, Config(points=0))
    sft = Step("sft", train, Config(), {"prune": prune})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("w")
    (tmp_path / "recipe.json").write_text("{}")
    secret = "hf://user:geheim@host/data?token=geheim&rows=3"
    params = {"sft.lr": 3e-4, "sft.data": secret, "prune.ratio": 0.65, "long": "x" * 7000}
    with ThreadPoolExecutor(1) as pool:
        execute([prune], store, lambda *what: pool.submit(run, *what), None, lambda event: None)
    tags = {"recipe": "default"}
    with Tracking(local(root), root, params=params, tags=tags, name="first") as tracking:
        go(tracking, store, sft)
        tracking.scores({"share": 0.9})
        tracking.artifact(tmp_path / "adapter", "adapter")
        tracking.artifact(tmp_path / "recipe.json")
        tracking.artifact(tmp_path / "missing")
    said = capsys.readouterr().err
    assert "long is cut to 6000 of its 7000 characters" in said

    runs = found(root)
    assert set(runs) == {"first", "sft"}  # prune was cached
    assert {one.info.status for one in runs.values()} == {"FINISHED"}
    first, nested = runs["first"], runs["sft"]
    assert nested.data.tags["mlflow.parentRunId"] == first.info.run_id
    assert nested.data.tags["key"] == sft.key
    assert nested.data.tags["unit"] == "nats"
    assert nested.data.tags["stage"] == sft.name
    for one in (first, nested):
        assert one.data.tags["recipe"] == "default"
        assert one.data.params["sft.lr"] == "0.0003"
        assert one.data.params["prune.ratio"] == "0.65"
        assert one.data.params["long"] == "x" * 6000
    assert first.data.metrics == {"share": 0.9}
    assert nested.data.metrics["rows"] == 7
    curve = client(root).get_metric_history(nested.info.run_id, "loss")
    assert [(p.step, p.value) for p in curve] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 0.25)]
    assert [p.timestamp for p in curve[:3]] == [1_700_000_001_000 + 1000 * i for i in range(3)]
    assert (root / "artifacts" / first.info.run_id / "artifacts/adapter/weights").read_text() == "w"
    assert (root / "artifacts" / first.info.run_id / "artifacts/recipe.json").exists()
    assert not list((root / "unsent").iterdir())
    assert b"geheim" not in (root / "mlflow.db").read_bytes()
    assert first.data.params["sft.data"] == "hf://***@host/data?token=***&rows=3"


def test_an_artifact_that_is_not_taken_does_not_keep_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "artifacts").write_text("a file where the store's directory is to be")
    with Tracking(local(tmp_path), tmp_path, params={}, tags={}, name="kept") as tracking:
        tracking.artifact(tmp_path / "recipe.json")
        tracking.scores({"share": 0.9})
    run = found(tmp_path)["kept"]
    assert run.info.status == "FINISHED" and run.data.metrics == {"share": 0.9}
    assert "recipe.json is not taken by the store and is no artifact: " in capfd.readouterr().err
    assert not list((tmp_path / "unsent").iterdir())


def test_failure_and_ctrl_c_close_all_runs(root: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with (
        pytest.raises(StepFailed),
        Tracking(local(root), root, params={}, tags={}, name="bad", experiment="f") as tracking,
    ):
        go(tracking, store, Step("lost", train, Config(error="http://me:geheim@host is lost")))
    runs = found(root, "f")
    assert {name: one.info.status for name, one in runs.items()} == {
        "bad": "FAILED",
        "lost": "FAILED",
    }
    assert len(client(root).get_metric_history(runs["lost"].info.run_id, "loss")) == 3
    assert "http://***@host is lost" in runs["lost"].data.tags["error"]

    with (
        pytest.raises(KeyboardInterrupt),
        Tracking(local(root), root, params={}, tags={}, name="stop", experiment="k") as tracking,
    ):
        step = Step("open", train, Config())
        execute([step], store, lambda *what: interrupted(), None, tracking.on)
    runs = found(root, "k")
    assert {name: one.info.status for name, one in runs.items()} == {
        "stop": "KILLED",
        "open": "KILLED",
    }


def interrupted() -> Any:
    raise KeyboardInterrupt


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def other() -> Iterator[int]:
    """The port of a server that is not MLflow."""
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_store_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, silent: int, other: int
) -> None:
    (tmp_path / "text").write_text("this is no database")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    for uri in (
        f"http://user:geheim@127.0.0.1:{closed}",
        f"http://127.0.0.1:{silent}",
        f"http://127.0.0.1:{other}",
        "databricks",
        "sqlite:///relative.db",
        f"sqlite:///{tmp_path}/text",
        f"sqlite:///{tmp_path}/text/below.db",
    ):
        start = time.monotonic()
        with pytest.raises(UserError, match="^tracking: found .*; accepted: http.*") as caught:
            check(uri)
        assert time.monotonic() - start < 10
        assert "\n" not in str(caught.value)
        assert "geheim" not in str(caught.value)
    check(local(tmp_path))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*) from sqlite_master").fetchone() == (0,)


@pytest.mark.parametrize(("one", "other"), [("tracking", "mlflow"), ("sender", "torch")])
def test_neither_process_carries_the_libraries_of_the_other(one: str, other: str) -> None:
    code = f"import sys, pipelines.{one}; sys.exit('{other}' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
    )
