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
from pipelines.journal import Journal, flat, redact
from pipelines.runs import Runs
from pipelines.sender import flush
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
    params = {"sft": {"lr": 3e-4, "data": secret}, "prune.ratio": 0.65, "long": "x" * 7000}
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


def test_curve_is_sent_once_whatever_becomes_of_its_file(root: Path, tmp_path: Path) -> None:
    """A killed worker tears a line, its successor shortens the file, the sender is killed too."""
    journal, lock = Journal.create(
        root, op="begin", uri="", experiment="curve", name="c", params={"a": "1"}, tags={}
    )
    curve = tmp_path / "metrics.jsonl"

    def rows(*steps: int) -> str:
        return "".join(
            json.dumps({"step": n, "time": 5.0 + n, "loss": 1.0 + n}) + "\n" for n in steps
        )

    journal.write(op="start", key="k", name="sft", curve=str(curve))
    runs = Runs(journal, local(root))
    curve.write_text(rows(1, 2, 3) + '{"step": 4, "lo')
    assert not runs.advance()
    curve.write_text(rows(1, 2))
    runs.advance()
    curve.write_text(
        rows(1, 2, 3, 4) + '{"step": 5, "lo' + rows(5) + rows(6) + rows(6).replace("11.0", "99.0")
    )
    state = journal.state()
    Runs(journal, local(root)).advance()
    journal.save(state)  # as if the sender had died before it noted what it had sent
    Runs(journal, local(root)).advance()
    (journal.folder / "state.json").unlink()
    runs = Runs(journal, local(root))
    runs.advance()
    runs.end("FINISHED", "")
    lock.release()
    journal.remove()
    assert set(found(root, "curve")) == {"c", "sft"}
    experiment = client(root).get_experiment_by_name("curve").experiment_id
    assert len(client(root).search_runs([experiment])) == 2
    points = client(root).get_metric_history(found(root, "curve")["sft"].info.run_id, "loss")
    assert [(p.step, p.value) for p in points] == [(n, 1.0 + n) for n in (1, 2, 3, 4, 6)]


def test_what_a_dead_driver_left_is_sent_and_closed(root: Path) -> None:
    message = {"uri": local(root), "experiment": "dead", "name": "d", "params": {}, "tags": {}}
    journal, lock = Journal.create(root, op="begin", **message)
    journal.write(op="start", key="k", name="sft", curve="/nowhere")
    assert flush(root, None)
    assert journal.folder.exists(), "its driver lives"
    lock.release()
    assert flush(root, None)
    assert {one.info.status for one in found(root, "dead").values()} == {"KILLED"}
    assert not journal.folder.exists()


def test_what_the_store_refuses_holds_up_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = {"uri": local(root), "experiment": "odd", "name": "o", "params": {}, "tags": {}}
    journal, lock = Journal.create(root, op="begin", **message)
    journal.write(op="scores", metrics={"no *name*": 1.0})
    journal.write(op="scores", metrics={"good": 1.0})
    journal.write(op="end", status="FINISHED", error="")
    lock.release()
    assert flush(root, local(root))
    assert "not taken by the store" in capsys.readouterr().err
    assert found(root, "odd")["o"].data.metrics == {"good": 1.0}


def test_a_message_that_a_full_disk_tore_is_left_out(root: Path) -> None:
    message = {"uri": local(root), "experiment": "torn", "name": "t", "params": {}, "tags": {}}
    journal, lock = Journal.create(root, op="begin", **message)
    with (journal.folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"op": "scores", "metr')
    journal.write(op="scores", metrics={"good": 1.0})
    journal.write(op="end", status="FINISHED", error="")
    lock.release()
    assert flush(root, local(root)) and not journal.folder.exists()
    assert found(root, "torn")["t"].data.metrics == {"good": 1.0}


def test_a_deleted_experiment_is_there_again(root: Path) -> None:
    for name in ("before", "after"):
        with Tracking(local(root), root, params={}, tags={}, name=name, experiment="x"):
            pass
        if name == "before":
            known = client(root).get_experiment_by_name("x")
            client(root).delete_experiment(known.experiment_id)
    assert {one.info.status for one in found(root, "x").values()} == {"FINISHED"}
    assert "after" in found(root, "x")


def test_a_store_of_another_mlflow_is_away_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")
    with Tracking(
        local(tmp_path), tmp_path, params={}, tags={}, name="n", patience_s=1.0
    ) as tracking:
        for _ in range(3):
            tracking.scores({"loss": 1.0})
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("is away") == 1
    assert "5 messages not sent" in said and len(list((tmp_path / "unsent").iterdir())) == 1


def test_secrets_are_removed_and_the_rest_is_not() -> None:
    uri = "s3://key:secret@bucket/a?X-Amz-Signature=abc&part=1"
    assert redact(uri) == "s3://***@bucket/a?X-Amz-Signature=***&part=1"
    assert redact("sqlite:////home/a@b/x.db hf://org/name@main") == (
        "sqlite:////home/a@b/x.db hf://org/name@main"
    )
    assert flat({"a": {"b": (1, 2)}, "c": None}) == {"a.b": "(1, 2)", "c": "None"}


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
