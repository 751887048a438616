"""What trials tell the driver, a JSON line each; kept, so that a killed search is played again."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.journal import append, messages
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
        """Those in `directory`, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "notes.jsonl").touch()
        return cls(directory / "notes.jsonl")

    def write(self, **note: Any) -> None:
        """Append a note, one writer after another: over a network, appends at once would mix."""
        while (lock := try_lock(self.file.with_suffix(".lock"))) is None:
            time.sleep(0.01)
        try:
            append(self.file, note)
        finally:
            lock.release()

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole notes from byte `start` on, each with the byte after its end; one that the kill
        of its writer tore is left out."""
        yield from messages(self.file, start)

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
