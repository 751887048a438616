"""A journal's messages made into MLflow's runs; the one module that imports MLflow.

A message may come again when it is not certain that it arrived: runs are found by their tag
`loram.id`, and params and points that are there already stay as they are.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

from pipelines.journal import Journal, redact, say
from pipelines.lock import try_lock

PIPELINE = ""  # beside the keys of steps
# A server that does not answer must not hold up what waits behind it.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
UPLOAD_S = "120"  # a server answers once it has passed an artifact on
PERSIST_S = 30.0  # with an artifact, before what waits behind it goes on
USELESS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # to send again


def trouble(uri: str) -> str:
    """Why the server cannot be used; empty if it answers within a few seconds as MLflow does."""
    path = "/api/2.0/mlflow/experiments/search"
    creds = get_default_host_creds(uri.rstrip("/"))
    asked = {"json": {"max_results": 1}, "max_retries": 0, "timeout": 4, "raise_on_status": False}
    try:
        verify_rest_response(http_request(creds, path, "POST", **asked), path).json()
    except Exception as error:
        return line(error)
    return ""


class Runs:
    """A journal's messages made into calls, and how far that has got."""

    def __init__(self, journal: Journal, uri: str) -> None:
        os.environ |= SETTINGS | os.environ
        self.journal, self.uri = journal, uri
        with self._alone():
            self.client = MlflowClient(tracking_uri=uri)  # creates a SQLite store's tables
        # runs: those still open, by the step's key: id, curve, since, sent (the last step by name)
        # refused: since when the next message, an artifact, is not taken; 0 if it is none
        state = {"start": 0, "experiment": "", "runs": {}, "refused": 0.0}
        self.state: dict[str, Any] = state | journal.state()
        self.begin: dict[str, Any] = next(journal.read(0))[0]
        self.stamps: dict[str, tuple[int, int]] = {}

    def advance(self) -> bool:
        """Send all that is there; true once the pipeline's run is closed."""
        for message, end in self.journal.read(self.state["start"]):
            self._apply(message)
            self.state["start"] = end
            self.journal.save(self.state)
            if message["op"] == "end":
                return True
        for run in self.state["runs"].values():
            self._follow(run)
        return False

    def end(self, status: str, error: str, at: float | None = None) -> None:
        """Close the pipeline's run; steps that are still open were cut off."""
        for key in [key for key in self.state["runs"] if key != PIPELINE]:
            self._close(key, "KILLED", error, at)
        self._close(PIPELINE, status, error, at)

    def _apply(self, message: dict[str, Any]) -> None:
        at, key = message["time"], message.get("key", PIPELINE)
        match message["op"]:
            case "begin":
                self.state["experiment"] = self._experiment()
                self._open(PIPELINE, message["name"], at, {}, "", message["params"])
            case "start":
                parent = self.state["runs"][PIPELINE]["id"]
                tags = {"mlflow.parentRunId": parent, "stage": message["name"], "key": key}
                tags |= message.get("tags", {})
                params = message.get("params", self.begin["params"])
                self._open(key, message["name"], at, tags, message["curve"], params)
            case "finish":
                run = self.state["runs"][key]
                run["curve"] = message["curve"]
                self._follow(run)
                self._log(key, message["metrics"], at)
                self._close(key, message["status"], message["error"], at)
            case "scores":
                self._log(PIPELINE, message["metrics"], at)
            case "artifact":
                self._copy(Path(message["path"]), message["folder"])
            case "end":
                self.end(message["status"], message["error"], at)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: two that create one SQLite store crash, in this and in MLflow."""
        root = self.journal.folder.parents[1]
        while (lock := try_lock(root / "lock")) is None:
            time.sleep(0.1)
        try:
            yield
        finally:
            lock.release()

    def _experiment(self) -> str:
        name = self.begin["experiment"]
        with self._alone():
            if known := self.client.get_experiment_by_name(name):
                if known.lifecycle_stage == "deleted":
                    self.client.restore_experiment(known.experiment_id)
                    say(f"experiment {name} had been deleted and is restored")
                return str(known.experiment_id)
            uri = None  # a server knows where it keeps artifacts
            if self.uri.startswith("sqlite"):
                uri = (Path(self.uri.removeprefix("sqlite:///")).parent / "artifacts").as_uri()
            return str(self.client.create_experiment(name, artifact_location=uri))

    def _open(
        self,
        key: str,
        name: str,
        at: float,
        tags: dict[str, str],
        curve: str,
        texts: dict[str, str],
    ) -> None:
        own = f"{self.journal.folder.name}/{key}"
        found = self.client.search_runs([self.state["experiment"]], f"tags.`loram.id` = '{own}'")
        if found:
            run = found[0].info.run_id
        else:
            tags = {**self.begin["tags"], **tags, "loram.id": own}
            made = self.client.create_run(self.state["experiment"], int(at * 1000), tags, name)
            run = made.info.run_id
        params = [Param(*pair) for pair in texts.items()]
        for first in range(0, len(params), 100):
            self._call(self.client.log_batch, run, params=params[first : first + 100])
        self.state["runs"][key] = {"id": run, "curve": curve, "since": at, "sent": {}}

    def _close(self, key: str, status: str, error: str, at: float | None) -> None:
        run = self.state["runs"][key]
        self._follow(run)
        if error:
            self._call(self.client.set_tag, run["id"], "error", error[:5000])
        end = int((at or time.time()) * 1000)
        self._call(self.client.set_terminated, run["id"], status, end_time=end)
        del self.state["runs"][key]

    def _log(self, key: str, values: Mapping[str, Any], at: float) -> None:
        """Final numbers as metrics, at the end of a curve of that name; anything else as tags."""
        run, ms = self.state["runs"][key], int(at * 1000)
        last = run["sent"]
        metrics = [Metric(n, v, ms, last.get(n, 0)) for n, v in values.items() if _number(v)]
        tags = [RunTag(n, redact(str(v))) for n, v in values.items() if not _number(v)]
        self._call(self.client.log_batch, run["id"], metrics, tags=tags)

    def _follow(self, run: dict[str, Any]) -> None:
        """Send the points that are new in a curve: of each metric, those of later steps.

        A file that has changed is read from its start: a resumed step may have shortened it.
        """
        try:
            stat = os.stat(run["curve"])
            stamp = stat.st_mtime_ns, stat.st_size
            if self.stamps.get(run["id"]) == stamp:
                return
            texts = Path(run["curve"]).read_text().split("\n")[:-1]
        except OSError:
            return  # not begun, or the step has none
        points, latest = [], run["sent"].copy()
        for text in texts:
            try:
                row = json.loads(text)
                step, at = row.pop("step"), int(row.pop("time", run["since"]) * 1000)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # torn by the kill of its writer
            for name, value in row.items():
                if _number(value) and step > latest.get(name, -1):
                    points.append(Metric(name, value, at, step))
                    latest[name] = step
        for first in range(0, len(points), 500):
            self._call(self.client.log_batch, run["id"], points[first : first + 500])
        run["sent"] = latest
        self.stamps[run["id"]] = stamp
        self.journal.save(self.state)

    def _copy(self, path: Path, folder: str) -> None:
        if not path.exists():
            return say(f"{path} is gone and is no artifact")
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        quick, os.environ[TIMEOUT] = os.environ[TIMEOUT], UPLOAD_S
        try:
            self._call(log, self.state["runs"][PIPELINE]["id"], str(path), folder or None)
        except Exception as error:  # of HTTP, of a client that is not installed, of a disk
            self.state["refused"] = self.state["refused"] or time.time()
            self.journal.save(self.state)
            away = self.uri.startswith("http") and trouble(self.uri)
            if away or time.time() - self.state["refused"] < PERSIST_S:
                raise
            say(f"{path} is not taken by the store and is no artifact: {line(error)}")
        finally:
            os.environ[TIMEOUT] = quick
        self.state["refused"] = 0.0

    def _call(self, call: Callable[..., Any], *args: Any, **named: Any) -> None:
        """Call, but let what the store will never take go by, so that the rest can follow."""
        try:
            call(*args, **named)
        except MlflowException as error:
            if error.error_code not in USELESS:
                raise
            say(f"not taken by the store: {line(error)}")


def line(error: Exception) -> str:
    """The error on one line, without secrets."""
    return redact(" ".join(str(error).split()))[:300]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
