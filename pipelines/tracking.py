"""MLflow: a run a pipeline, a nested run for each step that really ran.

The driver only writes messages into a journal. A companion process (sender.py), which outlives a
killed driver, sends them, follows the steps' curves and closes the runs. While the server is away
the journal and the curves wait; what could not be sent in the end is sent by the next run, or by
`python -m pipelines.tracking flush`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from loram.errors import refuse
from pipelines.execute import CURVE, Event
from pipelines.journal import Journal, redact, say, texts

LONGEST = 6000  # characters that MLflow takes as the value of a param
PATIENCE_S = 60.0  # how long an unreachable server is waited for when the run is over


def local(root: Path) -> str:
    """The URI of the embedded SQLite store below `root`."""
    return f"sqlite:///{root.absolute()}/mlflow.db"


def viewer(uri: str) -> str:
    """What a user types or opens to look at the store."""
    uri = redact(uri)
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def check(uri: str) -> None:
    """Find out in under ten seconds whether the store can be used.

    Raises:
        UserError: it cannot be reached or written, or its URI is of no kind that is supported.
    """
    accepted = "http(s)://HOST of a running MLflow server, or sqlite:////ABSOLUTE/PATH.db"
    if uri.startswith(("http://", "https://")):
        from pipelines.runs import trouble  # MLflow takes two seconds to import

        if found := trouble(uri):
            refuse("tracking", f"{redact(uri)} ({redact(found)})", accepted)
        return
    if not uri.startswith("sqlite:////"):
        refuse("tracking", redact(uri), accepted)
    database = Path(uri.removeprefix("sqlite:///"))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.open("ab+") as file:
            file.seek(0)
            start = file.read(15)
    except OSError as error:
        refuse("tracking", f"{uri} ({error.strerror})", accepted)
    if start not in (b"", b"SQLite format 3"):
        refuse("tracking", f"{uri} (no SQLite database)", accepted)


class Tracking:
    """The run of one pipeline, as a context manager.

    Args:
        uri: `local(root)` or a tracking server.
        root: where the journals lie (and the SQLite store): home() / "mlflow".
        params: logged as texts, on the nested runs too.
        tags: of the pipeline's run and the nested ones.
        name: of the pipeline's run.

    A run ends as FINISHED, as FAILED by an exception, or as KILLED by Ctrl-C or a killed driver.
    """

    def __init__(
        self,
        uri: str,
        root: Path,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        name: str,
        experiment: str = "loram",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._uri, self._patience_s = uri, patience_s
        shown = texts(params)
        for key, text in shown.items():
            if len(text) > LONGEST:
                say(f"{key} is cut to {LONGEST} of its {len(text)} characters")
                shown[key] = text[:LONGEST]
        self._journal, self._lock = Journal.create(
            root,
            op="begin",
            uri=redact(uri),
            experiment=experiment,
            name=name,
            params=shown,
            tags=texts(tags),
        )

    def __enter__(self) -> "Tracking":
        self._sender = self._send()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = (
            "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        )
        self._write(op="end", status=status, error=redact(str(error or "")))
        self._lock.release()
        if self._sender.wait() < 0:  # the companion was killed
            self._sender = self._send()
            self._sender.wait()

    def on(
        self,
        event: Event,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Note what happened to a step.

        Args:
            params, tags: of its nested run, where they are not those of the pipeline's.
        """
        step, curve = event.step, (event.path / CURVE).absolute()
        if event.kind == "started":
            own = {"params": texts(params)} if params else {}
            own |= {"tags": texts(tags)} if tags else {}
            self._write(op="start", key=step.key, name=step.name, curve=str(curve), **own)
        elif event.kind == "finished":
            self.finish(step.key, {**event.metrics, "seconds": event.seconds}, curve, "")
        elif event.kind == "failed":
            self.finish(step.key, {}, curve, event.text)

    def begin(
        self, key: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """A nested run with a name, params and tags of its own, such as a sweep's trial."""
        self._write(
            op="start", key=key, name=name, curve="", params=texts(params), tags=texts(tags)
        )

    def finish(
        self, key: str, metrics: Mapping[str, float | str], curve: Path | None, error: str
    ) -> None:
        """Close what `begin` opened; curve: its `metrics.jsonl`. An error makes it FAILED."""
        self._write(
            op="finish",
            key=key,
            status="FAILED" if error else "FINISHED",
            curve=str(curve or ""),
            metrics=dict(metrics),
            error=redact(error),
        )

    def scores(self, metrics: Mapping[str, float]) -> None:
        """Final numbers, on the pipeline's run."""
        self._write(op="scores", metrics=dict(metrics))

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or a directory, copied to the pipeline's run below `folder`."""
        self._write(op="artifact", path=str(path.absolute()), folder=folder)

    def _write(self, **message: Any) -> None:
        self._journal.write(**message)
        if self._sender.poll() is not None:
            self._sender = self._send()  # the companion was killed; another goes on

    def _send(self) -> "subprocess.Popen[bytes]":
        root = Path(__file__).parents[1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pipelines.sender", str(self._journal.folder)]
        return subprocess.Popen(
            [*command, str(self._patience_s)],
            env=os.environ | {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": self._uri},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the driver
        )


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    from pipelines.assets import home
    from pipelines.sender import flush

    parser = argparse.ArgumentParser(prog="python -m pipelines.tracking")
    verbs = parser.add_subparsers(dest="verb", required=True)
    flushing = verbs.add_parser("flush", help="send what earlier runs could not send")
    flushing.add_argument("--tracking", help="the server's URI, if it needs a password")
    options = parser.parse_args(words)
    done = flush(home() / "mlflow", options.tracking)
    if done:
        say("all is sent")
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
