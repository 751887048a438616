"""What trials tell the driver, a JSON line each; kept, so that a killed search is played again."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.lock import try_lock
from tune.space import Value


@dataclass(frozen=True)
class Notes:
    """The notes of one search. Several processes append to them.

    `trial`, `values`: a trial begins, or with `step`, `held_out_loss` and `error` is at a rung.
    `values`, `ended`: one is over, after so many steps, and did not fail.
    """

    file: Path

    @classmethod
    def open(cls, directory: Path) -> "Notes":
        """Those in `directory`, without a last line that the kill of its writer tore."""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "notes.jsonl").open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        return cls(directory / "notes.jsonl")

    def write(self, **note: Any) -> None:
        """Append a note, one writer after another: over a network, appends at once would mix."""
        while (lock := try_lock(self.file.with_suffix(".lock"))) is None:
            time.sleep(0.01)
        try:
            with self.file.open("ab", buffering=0) as file:
                file.write(json.dumps(note).encode() + b"\n")
        finally:
            lock.release()

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole notes from byte `start` on, each with the byte after its end; one that the kill
        of its writer tore is left out, with what follows in its line."""
        with self.file.open("rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                with contextlib.suppress(ValueError):
                    if line.endswith(b"\n"):
                        yield json.loads(line), start

    def begun(self) -> list[dict[str, Value]]:
        """The different values of all trials, in the order in which they began."""
        found: list[dict[str, Value]] = []
        for note, _ in self.read():
            if note["values"] not in found:
                found.append(note["values"])
        return found

    def ended(self, values: dict[str, Value]) -> int | None:
        """The step at which a trial with these values was over; None if none was."""
        steps = [n["ended"] for n, _ in self.read() if "ended" in n and n["values"] == values]
        return max(steps, default=None)
