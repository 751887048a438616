"""What a run has to tell its tracker: on disk before it is sent, so that nothing is lost.

    <root>/unsent/<id>/journal.jsonl    messages, an object a line; locked by the living driver
    <root>/unsent/<id>/state.json       how far it has been sent
    <root>/unsent/<id>/sender           locked by the one process that sends it

No message holds a secret: passwords and tokens in URIs are replaced by `***` before they are
written.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.lock import Lock, try_lock

SECRETS = (
    (re.compile(r"(\w://)[^/\s]+@"), r"\1***@"),  # scheme://user:pass@word@host
    (
        re.compile(r"([?&][^=&\s]*(?:token|sign|secret|key|passw|cred)[^=&\s]*=)[^&\s\"]+", re.I),
        r"\1***",
    ),
)


def redact(text: str) -> str:
    """The text without the passwords and tokens of the URIs in it."""
    for pattern, clean in SECRETS:
        text = pattern.sub(clean, text)
    return text


def say(text: str) -> None:
    """Tell the user, if the terminal is still there."""
    with contextlib.suppress(OSError):
        print(f"tracking: {text}", file=sys.stderr, flush=True)


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as redacted texts."""
    return {name: redact(str(value)) for name, value in values.items()}


def append(file: Path, message: Mapping[str, Any]) -> None:
    """Append a message to a file of JSON lines, also behind one that was torn."""
    line = json.dumps(message).encode() + b"\n"
    with file.open("ab+") as there:
        if there.tell():
            there.seek(-1, os.SEEK_END)
            if there.read(1) != b"\n":  # a kill or a full disk tore the message before
                line = b"\n" + line
        there.write(line)


def messages(file: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole messages from byte `start` on, each with the byte after its end; a torn one is left
    out."""
    with file.open("rb") as there:
        there.seek(start)
        for line in there:
            if not line.endswith(b"\n"):
                return  # being written; its rest must not count as a message
            start += len(line)
            with contextlib.suppress(ValueError):
                yield json.loads(line), start


@dataclass(frozen=True)
class Journal:
    """One run's messages, in a directory of their own until all are sent."""

    folder: Path

    @classmethod
    def create(cls, root: Path, **begin: Any) -> tuple["Journal", Lock]:
        """A new journal with its first message, and the lock that shows that its driver lives."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        draft = cls(root / "unsent" / f".{name}")
        draft.folder.mkdir(parents=True)
        lock = draft.living()
        assert lock is not None, "nobody else knows this file yet"
        draft.write(**begin)
        return cls(draft.folder.rename(root / "unsent" / name)), lock

    @classmethod
    def left(cls, root: Path) -> Iterator["Journal"]:
        """The journals of dead drivers."""
        for folder in sorted((root / "unsent").glob("[!.]*")):
            journal = cls(folder)
            lock = journal.living()
            if lock:
                lock.release()
                yield journal

    def living(self) -> Lock | None:
        """The driver's lock, or None while the driver lives."""
        return try_lock(self.folder / "journal.jsonl")

    def sender(self) -> Lock | None:
        """The sender's lock, or None while another process is sending."""
        return try_lock(self.folder / "sender")

    def write(self, **message: Any) -> None:
        """Append a message; its time is now."""
        append(self.folder / "journal.jsonl", message | {"time": time.time()})

    def read(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole messages from byte `start` on, each with the byte after its end; a torn one is
        left out."""
        yield from messages(self.folder / "journal.jsonl", start)

    def begun(self) -> bool:
        """Whether there is a first message; not so once another process has removed the journal."""
        file = self.folder / "journal.jsonl"
        return file.exists() and file.stat().st_size > 0

    def waiting(self, start: int) -> int:
        """How many messages lie after byte `start`."""
        return sum(1 for _ in self.read(start))

    def state(self) -> dict[str, Any]:
        """What `save` wrote last; empty at first."""
        try:
            return dict(json.loads((self.folder / "state.json").read_text()))
        except FileNotFoundError:
            return {}

    def save(self, state: dict[str, Any]) -> None:
        """Remember how far the messages have been sent."""
        draft = self.folder / "state.draft"
        draft.write_text(json.dumps(state))
        os.replace(draft, self.folder / "state.json")

    def remove(self) -> None:
        """All is sent."""
        shutil.rmtree(self.folder, ignore_errors=True)
