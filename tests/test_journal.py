"""What a journal's messages come to in MLflow, whatever happened to them and to the store."""

import json
import sqlite3
from pathlib import Path

import pytest

from pipelines.journal import Journal, redact, texts
from pipelines.runs import Runs
from pipelines.sender import flush
from pipelines.tracking import Tracking, local
from tests.test_tracking import client, found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


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
    assert redact('"http://me:p@s\\"s@host:5000", "a@b"') == '"http://***@host:5000", "a@b"'
    assert texts({"a.b": (1, 2), "c": None}) == {"a.b": "(1, 2)", "c": "None"}
