"""Finished steps on disk: a directory is there exactly when it is complete.

    <root>/sft-3f9a0c2b71de/          an entry: what the step wrote, and record.json
    <root>/work/sft-3f9a0c2b71de/     an unfinished step's checkpoints; they survive a crash
    <root>/partial/                   entries being written
    <root>/locks/  <root>/digests/    who uses what; remembered checksums
    <root>/reports/                   what commands made of finished steps

The root may be a local path or a shared file system. Readers of an entry hold its lock together,
the one who makes or removes it holds it alone.
`python -m pipelines.store list | remove ENTRY... | clean` looks at it and makes room.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.errors import UserError, refuse
from pipelines.assets import home
from pipelines.digest import forget_absent
from pipelines.lock import Lock, try_lock
from pipelines.seal import RECORD, flaw, sync


@dataclass(frozen=True)
class Store:
    """A directory of entries, each named by its slug: `<step>-<first 12 digits of its key>`."""

    root: Path

    @classmethod
    def at(cls, given: str) -> "Store":
        """That of a recipe; the default one if it names none.

        Raises:
            UserError: a relative path in a cluster, where a job's directory is a copy that goes
                with it, and other nodes have others.
        """
        paths = {"store": given, "LORAM_HOME": os.environ.get("LORAM_HOME", "")}
        for setting, path in paths.items() if os.environ.get("RAY_ADDRESS") else ():
            if path and not Path(path).is_absolute():
                refuse(setting, path, "an absolute path, on all nodes the same directory")
        return cls(Path(given or home() / "store").absolute())

    def entry(self, slug: str) -> Path:
        """Where the finished step is, or will be."""
        return self.root / slug

    def work(self, slug: str) -> Path:
        """Where the step keeps what a second attempt can go on from; removed by `commit`."""
        return self.root / "work" / slug

    def lock(self, slug: str, *, shared: bool = False) -> Lock | None:
        """The entry's lock, or None while another holder is in the way.

        Raises:
            UserError: the store cannot be written, or its file system has no locks.
        """
        try:
            return try_lock(self.root / "locks" / slug, shared=shared)
        except OSError as error:
            found = f"{self.root} ({error.strerror})"
            refuse("store", found, "a directory that can be written, on a file system with flock")

    def slugs(self) -> list[str]:
        """All entries, intact or not."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{RECORD}"))

    def record(self, slug: str) -> dict[str, Any]:
        """What `seal` wrote about the entry.

        Raises:
            OSError, ValueError: there is none, or it is no JSON.
        """
        return dict(json.loads((self.entry(slug) / RECORD).read_text()))

    def known(self, slug: str) -> dict[str, Any] | None:
        """`record`, or None if the entry was removed: of a finished run only its end is needed."""
        with contextlib.suppress(FileNotFoundError):
            return self.record(slug)
        return None

    def flaw(self, slug: str, key: str) -> str:
        """Why the entry cannot be used; empty if every byte is as its record says.

        Raises:
            UserError: a file is there and cannot be read now, which is no reason to lose it.
        """
        entry = self.entry(slug)
        try:
            return flaw(entry, key, self.root / "digests")
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            found = f"{error.filename or entry} ({error.strerror})"
            refuse("store", found, "entries that can be read; `store remove` removes one")

    def touch(self, slug: str) -> None:
        """Remember that the entry was used now, for `clean`."""
        with contextlib.suppress(OSError):
            os.utime(self.entry(slug) / RECORD)

    def begin(self, slug: str) -> Path:
        """An empty directory to write the entry in; the caller holds the lock alone.

        What dead runs left half-written is removed, and so is an entry with a flaw.
        """
        self.discard(slug)
        for stale in (self.root / "partial").glob(f"{slug}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        self.work(slug).mkdir(parents=True, exist_ok=True)
        partial = self.root / "partial" / f"{slug}.{uuid.uuid4().hex[:8]}"
        partial.mkdir(parents=True)
        return partial

    def commit(self, slug: str, partial: Path) -> Path:
        """Give a sealed directory its name, in one rename; the caller holds the lock alone.

        Raises:
            UserError: it was sealed in a directory of that name elsewhere.
        """
        entry = self.entry(slug)
        if not (partial / RECORD).exists():
            found = f"{self.root}, which the node that ran {slug} does not share"
            refuse("store", found, "a directory that all nodes share")
        partial.rename(entry)
        sync(self.root)
        shutil.rmtree(self.work(slug), ignore_errors=True)
        return entry

    def discard(self, slug: str) -> None:
        """Remove an entry, never leaving half of it; the caller holds the lock alone."""
        trash = self.root / "partial" / f"{slug}.{uuid.uuid4().hex[:8]}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.entry(slug).rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def remove(store: Store, names: list[str]) -> list[str]:
    """Remove entries, named by slug or by the start of one or of a key; returns their slugs.

    Raises:
        UserError: no entry, or several, fit a name, or a run is using it; nothing is removed then.
    """
    locks = {}
    try:
        for name in names:
            fit = [s for s in store.slugs() if name in (s, s[: len(name)], s[-12:][: len(name)])]
            if len(fit) != 1:
                refuse("entry", f"{name!r}, which fits {fit or 'nothing'}", "the name of one entry")
            if fit[0] in locks:
                continue
            lock = store.lock(fit[0])
            if lock is None:
                refuse("entry", f"{fit[0]}, in use by a run", "an entry that no run is using")
            locks[fit[0]] = lock
        for slug in locks:
            store.discard(slug)
    finally:
        for lock in locks.values():
            lock.release()
    return list(locks)


def clean(store: Store, unused_days: float | None) -> list[str]:
    """Remove what dead runs left and, if asked, entries not used for so many days.

    Whatever a run is using stays. Returns the paths removed, relative to the root.
    """
    leftovers = [p for part in ("partial", "work") for p in (store.root / part).glob("*")]
    chosen = [(path.name.partition(".")[0], path) for path in leftovers]
    if unused_days is not None:
        limit = time.time() - unused_days * 86_400
        chosen += [(slug, store.entry(slug)) for slug, at in last_uses(store) if at < limit]
    removed = []
    for slug, path in chosen:
        if lock := store.lock(slug):
            if path == store.entry(slug):
                store.discard(slug)
            else:
                shutil.rmtree(path, ignore_errors=True)
            lock.release()
            removed.append(str(path.relative_to(store.root)))
    forget_absent(store.root / "digests")
    return removed


def last_uses(store: Store) -> Iterator[tuple[str, float]]:
    """Of each entry the time of its last use; others may be removing some meanwhile."""
    for slug in store.slugs():
        with contextlib.suppress(FileNotFoundError):
            yield slug, (store.entry(slug) / RECORD).stat().st_mtime


def listing(store: Store) -> list[str]:
    """One line an entry: its slug, bytes, days since its last use, and whether a run uses it."""
    lines = [f"{'entry':40} {'MB':>10} {'unused days':>12}"]
    for slug, at in last_uses(store):
        size = sum(file["size"] for file in (store.known(slug) or {"files": {}})["files"].values())
        days = (time.time() - at) / 86_400
        if lock := store.lock(slug):
            lock.release()
        lines.append(f"{slug:40} {size / 1e6:10.1f} {days:12.1f}{'' if lock else '  in use'}")
    return lines


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.store", description="Results kept.")
    parser.add_argument("--store", default="", help="default: the store of make full")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="every entry with its size and last use")
    verbs.add_parser("remove", help="remove entries").add_argument("entry", nargs="+")
    cleaning = verbs.add_parser("clean", help="remove what dead runs left behind")
    cleaning.add_argument("--unused-days", type=float, help="also entries unused for so long")
    options = parser.parse_args(words)
    try:
        store = Store.at(options.store)
        if options.verb == "list":
            lines = listing(store)
        elif options.verb == "remove":
            lines = [f"removed {slug}" for slug in remove(store, options.entry)]
        else:
            lines = [f"removed {path}" for path in clean(store, options.unused_days)]
        print("\n".join(lines))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
