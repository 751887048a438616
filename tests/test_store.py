"""The store: damage, locks between threads and processes, and making room."""

import json
import multiprocessing
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from loram.errors import UserError
from pipelines import store as store_module
from pipelines.digest import file_digest, read_digest
from pipelines.execute import Event, execute, run
from pipelines.step import Metrics, Step
from pipelines.store import Store, clean, listing, remove


@dataclass(frozen=True)
class Config:
    seconds: float = 0.0


def tally(config: Config, *, out: Path, work: Path, place: Path, **inputs: Path) -> Metrics:
    """Write a file, and a line at `place` for each time this really ran."""
    with place.open("a") as file:
        file.write(f"{out.name.partition('-')[0]}\n")
    time.sleep(config.seconds)
    (out / "sub").mkdir()
    (out / "sub" / "weights").write_bytes(b"w" * 1000)
    return {"size": 1000}


def pair(seconds: float = 0.0) -> tuple[Step, Step]:
    first = Step("first", tally, Config(seconds))
    return first, Step("second", tally, Config(seconds), {"first": first})


def go(store: Store, step: Step, place: Path) -> list[Event]:
    events: list[Event] = []
    with ThreadPoolExecutor(4) as pool:
        execute([step], store, lambda *what: pool.submit(run, *what), place, events.append)
    return events


def child(root: Path, place: Path, out: Path) -> None:
    """One of two that begin together."""
    out.with_suffix(".ready").touch()
    while len(list(out.parent.glob("*.ready"))) < 2:
        time.sleep(0.01)
    events = go(Store(root), pair(seconds=0.7)[1], place)
    out.write_text(json.dumps([f"{event.kind} {event.step.name}" for event in events]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_two_processes_run_each_step_once(tmp_path: Path, store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    runs = [
        context.Process(target=child, args=(store.root, tmp_path / "tally", tmp_path / f"{i}.json"))
        for i in range(2)
    ]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert (tmp_path / "tally").read_text().split() == ["first", "second"]
    words = [word for i in range(2) for word in json.loads((tmp_path / f"{i}.json").read_text())]
    assert words.count("finished second") == 1 and "cached second" in words
    assert any(word.startswith("waiting") for word in words)


def test_what_another_run_finished_is_used_before_that_run_ends(
    tmp_path: Path, store: Store
) -> None:
    """Two runs that each make what the other needs would wait for one another for ever."""
    first, second = pair(seconds=1.0)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(go, store, second, tmp_path / "tally")
        while not list((store.root / "work").glob("first-*")):
            time.sleep(0.01)
        events = pool.submit(go, store, first, tmp_path / "tally").result()
        assert [event.kind for event in events] == ["waiting", "cached"]
        assert not other.done()
    assert (tmp_path / "tally").read_text().split() == ["first", "second"]


def test_what_was_written_where_the_store_is_not_shared_is_no_entry(store: Store) -> None:
    """A node without the shared directory writes to one of its own, under the same name."""
    step = pair()[0]
    with pytest.raises(UserError, match="does not share"):
        store.commit(step.slug, store.begin(step.slug))
    assert store.slugs() == [] and store.flaw(step.slug, step.key) == "missing"


@pytest.mark.parametrize("damage", ["changed", "shorter", "gone", "added", "record", "other"])
def test_damaged_entry_is_noticed_and_made_again(damage: str, tmp_path: Path, store: Store) -> None:
    step = pair()[0]
    go(store, step, tmp_path / "tally")
    weights = store.entry(step.slug) / "sub" / "weights"
    record = store.entry(step.slug) / "record.json"
    match damage:
        case "changed":
            weights.write_bytes(b"w" * 999 + b"x")
        case "shorter":
            weights.write_bytes(b"w" * 999)
        case "gone":
            weights.unlink()
        case "added":
            (weights.parent / "more").write_text("")
        case "record":
            record.write_text(record.read_text()[:-9])
        case "other":
            record.write_text(record.read_text().replace(step.key, "0" * 64))
    kinds = [event.kind for event in go(store, step, tmp_path / "tally")]
    assert kinds == ["damaged", "started", "finished"]
    assert not store.flaw(step.slug, step.key) and weights.read_bytes() == b"w" * 1000


def test_an_entry_that_cannot_be_read_now_is_kept(tmp_path: Path, store: Store) -> None:
    """Out of open files, as a stand-in for a network drive in trouble."""
    step = pair()[0]
    go(store, step, tmp_path / "tally")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match="Too many open files.*accepted: entries that can be"):
            store.flaw(step.slug, step.key)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [event.kind for event in go(store, step, tmp_path / "tally")] == ["cached"]


def test_remembered_digest_is_used_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"old")
    os.utime(file, (1e9, 1e9))
    old = file_digest(file, cache)
    assert old == read_digest(file)
    note = next(cache.iterdir())
    note.write_text(note.read_text().replace(old, "remembered"))
    assert file_digest(file, cache) == "remembered"
    file.write_bytes(b"new")
    os.utime(file, (1e9, 1e9))  # same size, same mtime: only ctime tells
    assert file_digest(file, cache) == read_digest(file) != old
    note.write_text("torn")
    assert file_digest(file, cache) == read_digest(file)


def test_stale_partial_directory_goes_with_the_next_owner(tmp_path: Path, store: Store) -> None:
    step = pair()[0]
    dead = store.begin(step.slug)
    (dead / "half").write_text("half")
    assert store.slugs() == []
    go(store, step, tmp_path / "tally")
    assert not list((store.root / "partial").iterdir())
    assert [path.name for path in store.entry(step.slug).rglob("*")].count("half") == 0


def test_remove_spares_what_is_in_use(tmp_path: Path, store: Store) -> None:
    first, second = pair()
    go(store, second, tmp_path / "tally")
    reader = store.lock(first.slug, shared=True)
    assert reader is not None
    with pytest.raises(UserError, match="in use"):
        remove(store, [second.slug, first.slug])
    assert store.slugs() == [first.slug, second.slug]
    assert "in use" in listing(store)[1] and "in use" not in listing(store)[2]
    assert clean(store, unused_days=-1) == [second.slug]
    reader.release()
    assert remove(store, [first.key[:8]]) == [first.slug]
    assert store.slugs() == []


def test_remove_wants_the_name_of_one_entry(tmp_path: Path, store: Store) -> None:
    first = Step("one", tally, Config(1e-6))
    for step in (first, Step("one", tally, Config(2e-6))):
        go(store, step, tmp_path / "tally")
    for name in ("one", "nothing", ""):
        with pytest.raises(UserError, match="accepted: the name of one entry"):
            remove(store, [name])
    assert len(store.slugs()) == 2


@pytest.mark.parametrize("made", ["before", "now"])
def test_running_driver_keeps_its_inputs(made: str, tmp_path: Path, store: Store) -> None:
    """While `second` runs, neither it nor the entry that it reads can be removed."""
    first, second = pair(seconds=0.5)
    if made == "before":
        go(store, first, tmp_path / "tally")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(go, store, second, tmp_path / "tally")
        while not list((store.root / "work").glob("second-*")):
            time.sleep(0.01)
        with pytest.raises(UserError, match="in use"):
            remove(store, [first.slug])
        assert clean(store, unused_days=-1) == []
        assert [event.kind for event in running.result()][-2:] == ["started", "finished"]


def test_clean_removes_leftovers_and_what_was_long_unused(tmp_path: Path, store: Store) -> None:
    first, second = pair()
    go(store, second, tmp_path / "tally")
    store.begin("dead-0123456789ab")
    os.utime(store.entry(first.slug) / "record.json", (1e9, 1e9))
    assert len(clean(store, None)) == 2 and len(store.slugs()) == 2
    assert clean(store, 30) == [first.slug]
    go(store, second, tmp_path / "tally")
    assert (tmp_path / "tally").read_text().split() == ["first", "second"]


def test_command_line(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    step = pair()[0]
    go(store, step, tmp_path / "tally")
    words = ["--store", str(store.root)]
    assert store_module.main([*words, "list"]) == 0
    assert step.slug in capsys.readouterr().out
    assert store_module.main([*words, "remove", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: entry: found 'none', which fits nothing")
    assert store_module.main([*words, "remove", step.slug]) == 0 and store.slugs() == []


def test_clean_forgets_the_digests_of_files_that_are_gone(tmp_path: Path, store: Store) -> None:
    for name in ("gone", "there"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1e9, 1e9))  # long settled
        file_digest(tmp_path / name, store.root / "digests")
    (tmp_path / "gone").unlink()
    (store.root / "digests" / "torn").write_text("{")
    clean(store, None)
    left = [note.read_text() for note in (store.root / "digests").iterdir()]
    assert len(left) == 2 and any("there" in note for note in left)
