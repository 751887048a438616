"""Files of every kind are read row by row; what is wrong with them is said in one line."""

import bz2
import gzip
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loram.errors import UserError
from loram.model import save
from pipelines import readers
from pipelines.locate import locate_model
from pipelines.readers import read_numbers, read_rows
from pipelines.sources import (
    SourceSpec,
    choose_files,
    digest,
    list_files,
    peek,
)
from tests.conftest import tiny_model

ROWS = [{"text": f"document {number} 🦙", "id": number} for number in range(1000)]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    """The rows in the form that the file's name says."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".bz2":
        path.write_bytes(bz2.compress(json.dumps(rows).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.bz2"])
def test_all_kinds_give_the_same_rows(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "PIECE", 1000)  # rows lie across the pieces
    path = str(write(tmp_path / name))
    assert [row.values for row in read_rows(path)] == ROWS
    numbers = np.concatenate(list(read_numbers(path)))
    assert numbers.tolist() == [row.number for row in read_rows(path)] == list(range(1000))
    some = np.array([0, 1, 299, 300, 555, 999])
    assert [row.values["id"] for row in read_rows(path, some)] == some.tolist()


def test_texts_are_separated_by_empty_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \n\nthree\r\n\r\nfour")
    found = [(row.number, row.values) for row in read_rows(str(tmp_path / "a.txt"))]
    assert found == [(0, {"text": "one\ntwo"}), (5, {"text": "three"}), (7, {"text": "four"})]
    some = list(read_rows(str(tmp_path / "a.txt"), np.array([5])))
    assert [row.number for row in some] == [5]


def test_malformed_rows_are_told_with_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 64)
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut of',
        b"",
        b'{"text": "\xff\xfe"}',
        b'["text"]',
        b'{"text": "' + b"long " * 40 + b'"}',
        b'{"text": "good again"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = list(read_rows(str(tmp_path / "a.jsonl")))
    assert [row.number for row in found] == [0, 1, 3, 4, 5, 6]
    assert [row.values is None for row in found] == [False, True, True, True, True, False]
    told = ["no JSON: Unterminated", "no UTF-8 text at byte 10", "but list", "longer than 64"]
    for row, reason in zip(found[1:5], told, strict=True):
        assert reason in row.reason
    numbers = np.concatenate(list(read_numbers(str(tmp_path / "a.jsonl"))))
    assert numbers.tolist() == [row.number for row in found]


def test_parquet_cells_that_are_no_text(tmp_path):
    raw = pa.array([b"good", b"\xff\xfe", b"good"]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())  # what a careless writer makes
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    found = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row.values is None for row in found] == [False, True, False]
    assert "no UTF-8" in found[1].reason


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_reading_does_not_hold_the_file(tmp_path, name):
    path = str(write(tmp_path / name, [{"text": "x" * 2000, "id": n} for n in range(20_000)]))
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    worst = max(pa.total_allocated_bytes() - arrow for _ in read_rows(path))
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert worst + python < 12e6, "of 40 MB"


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.json"])
def test_a_file_cut_off_is_refused_where_it_is_read(tmp_path, name):
    whole = write(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=rf"^source: found .*{name}.*; accepted: a whole"):
        list(read_rows(str(tmp_path / name)))


def refused(path: Path | str, *, chat: bool = False, **settings) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        peek(SourceSpec(str(path), **settings), "corpus.sources", chat=chat)
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_glance_refuses(tmp_path):
    assert "no/such, where no file is" in refused("no/such")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert "no file of a known kind; accepted: parquet" in refused(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl, which is empty" in refused(tmp_path / "*.jsonl")
    (tmp_path / "zero.txt").write_bytes(b"text\0" * 100)
    assert "zero bytes" in refused(tmp_path / "zero.txt")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1") * 9)
    assert "no UTF-8 text at byte 1" in refused(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_bytes(b"\n \n")
    assert "no readable row" in refused(tmp_path / "blank.txt")
    (tmp_path / "gone.jsonl").write_text('{"text": " "}\n{"text": 3}\n')
    assert "none of the first 2 rows is good (row 1: empty text)" in refused(
        tmp_path / "gone.jsonl"
    )
    whole = write(tmp_path / "rows.jsonl").read_bytes()
    found = refused(tmp_path / "rows.jsonl", text="content")
    assert found.startswith("corpus.sources: text: found no column 'content'")
    assert "'text', 'id'" in found
    assert "columns 'id', 'text'" in refused(tmp_path / "rows.jsonl", chat=True)
    (tmp_path / "talks.jsonl").write_text('{"instruction": "a", "output": ""}\n')
    assert "accepted: instructions with answers" in refused(tmp_path / "talks.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(whole[:-9])
    assert "cut off: its last row does not end" in refused(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["z.parquet", "z.json", "z.jsonl.gz"])
def test_a_glance_at_a_directory_sees_a_truncated_file_behind_good_ones(tmp_path, name):
    write(tmp_path / "a.jsonl")
    assert len(peek(SourceSpec(str(tmp_path)), "corpus.sources", chat=False)) == 1000
    whole = write(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: 60 if name.endswith("gz") else len(whole) // 2])
    assert name in refused(tmp_path)


def test_a_glance_gives_the_good_rows(tmp_path):
    write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b" * (n % 2)} for n in range(9)])
    found = peek(SourceSpec(str(tmp_path / "a.jsonl")), "instruct.sources", chat=True)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert found == [turns] * 4


def test_links_count_as_what_they_lead_to(tmp_path):
    """As the hub's cache holds files."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs" / "a", ROWS[:5])
    write(tmp_path / "snapshot" / "2.jsonl", ROWS[5:9])
    (tmp_path / "snapshot" / "1.jsonl").symlink_to("../blobs/a")
    for path in (tmp_path / "snapshot", tmp_path / "snapshot" / "*.jsonl"):
        source = SourceSpec(str(path))
        assert [file.size > 0 for file in list_files(source.path)] == [True, True]
        assert len(peek(source, "corpus.sources", chat=False)) == 9
        before = digest(source, None)
        write(tmp_path / "blobs" / "a", ROWS[:6])
        assert digest(source, None) != before
        write(tmp_path / "blobs" / "a", ROWS[:5])
    (tmp_path / "snapshot" / ".#1.jsonl").symlink_to("someone@machine.123:456")  # an editor's lock
    (tmp_path / "snapshot" / "latest").symlink_to("../blobs")
    assert len(list_files(source.path)) == 2
    (tmp_path / "snapshot" / "3.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match="3.jsonl, a link to no file"):
        list_files(source.path)


def test_a_digest_is_of_the_bytes_in_order(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for name in ("1.jsonl", "2.jsonl"):
            write(tmp_path / folder / name, ROWS[: 5 if name == "1.jsonl" else 9])
    first, second = (SourceSpec(str(tmp_path / folder)) for folder in "ab")
    cache = tmp_path / "cache"
    assert digest(first, cache) == digest(second, cache) == digest(first, None)
    write(tmp_path / "b" / "2.jsonl", ROWS[:10])
    assert digest(second, cache) != digest(first, cache)
    (tmp_path / "a" / "README.md").write_text("not data")
    before = digest(first, cache)
    assert before == digest(first, None)
    (tmp_path / "a" / "1.jsonl").rename(tmp_path / "a" / "0.jsonl")
    assert digest(first, cache) == before
    (tmp_path / "a" / "0.jsonl").rename(tmp_path / "a" / "0.txt")
    assert digest(first, cache) != before  # other rows


def test_a_share_is_chosen_by_seed_and_never_exceeded(tmp_path):
    for number in range(20):
        write(tmp_path / f"{number:02d}.jsonl", ROWS[: 10 + number])
    files = list_files(str(tmp_path))
    total = sum(file.size for file in files)
    choices = [choose_files(files, 0.25, seed, 0) for seed in range(5)]
    for chosen in choices:
        assert 0.15 * total < sum(file.size for file in chosen) <= 0.25 * total
        assert [file.uri for file in chosen] == sorted(file.uri for file in chosen)
    assert choices[0] == choose_files(files, 0.25, 0, 0)
    assert len({tuple(chosen) for chosen in choices}) == 5
    assert choose_files(files, 1.0, 0, 0) == files
    with pytest.raises(UserError, match="^share: found 0.001"):
        choose_files(files, 0.001, 0, 0)


def test_a_model_is_what_its_index_names(tmp_path):
    """Whatever its weights are called: one byte makes another model."""
    save(tiny_model("llama"), tmp_path / "model")
    weights = tmp_path / "model" / "weights-1.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(weights)
    index = {"weight_map": {"lm_head.weight": weights.name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    before = locate_model(str(tmp_path / "model"), tmp_path / "cache")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = locate_model(str(tmp_path / "model"), tmp_path / "cache")
    assert before.uri == after.uri and before.key != after.key
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="model: found .*nowhere"):
        locate_model(str(tmp_path / "model"), tmp_path / "cache")
