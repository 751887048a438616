"""The companion process of a run: it outlives a killed driver, sends its journal, closes its runs.

`python -m pipelines.sender JOURNAL PATIENCE_S`, with the store in $MLFLOW_TRACKING_URI; started by
`pipelines.tracking`.
"""

import logging
import os
import sys
import time
from pathlib import Path

from pipelines.journal import Journal, redact, say
from pipelines.runs import Runs, line, trouble

POLL_S = 0.5
UNSENT = 75  # exit status


def send(journal: Journal, uri: str, patience_s: float) -> bool:
    """Send a journal until its run is closed; false if the store stayed away for too long.

    While the driver lives there is no end to patience. If it died without closing its run, the run
    and the steps that were still open end as KILLED.
    """
    mine = journal.sender()
    if mine is None or not journal.begun():
        return True  # another process is at it, or was
    runs: Runs | None = None
    away, driver, limit = False, None, float("inf")
    while True:
        driver = driver or journal.living()
        if driver and limit == float("inf"):
            limit = time.monotonic() + patience_s
        ended = False
        try:
            runs = runs or Runs(journal, uri)
            ended = runs.advance()
            if driver and not ended:
                runs.end("KILLED", "the driver died")
                ended = True
            if away:
                say(f"{redact(uri)} is back")
            away = False
        except Exception as error:
            if not away:
                say(f"{redact(uri)} is away, its messages are kept: {line(error)}")
            away = True
        if ended or time.monotonic() > limit:
            break
        time.sleep(POLL_S)
    if ended:
        journal.remove()
    else:
        later = "the next run does, or `python -m pipelines.tracking flush`"
        waiting = journal.waiting(journal.state().get("start", 0))
        say(f"{waiting} messages not sent to {redact(uri)}: {later}")
    for lock in (mine, driver):
        if lock:
            lock.release()
    return ended


def flush(root: Path, uri: str | None, own: Journal | None = None) -> bool:
    """Send the journals of dead drivers but for `own`, for `uri` or all; true if none is left."""
    done = True
    for journal in Journal.left(root):
        if journal == own:
            continue  # its driver was fast
        begin = next((message for message, _ in journal.read(0)), {})
        if begin.get("op") != "begin":
            journal.remove()
        elif uri is None or begin["uri"] == redact(uri):
            done &= send(journal, uri or begin["uri"], patience_s=0.0)
    return done


def main() -> int:
    """Send what dead drivers left for this store, then the journal of the one that lives."""
    logging.disable(logging.INFO)  # SQLite's first start tells of its tables
    journal, uri = Journal(Path(sys.argv[1])), os.environ["MLFLOW_TRACKING_URI"]
    if not uri.startswith("http") or not trouble(uri):
        flush(journal.folder.parents[1], uri, own=journal)
    return 0 if send(journal, uri, patience_s=float(sys.argv[2])) else UNSENT


if __name__ == "__main__":
    raise SystemExit(main())
