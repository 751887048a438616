"""The data steps in a real Ray of two CPUs, on files as users have them, S3 among them."""

import gzip
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from moto.server import ThreadedMotoServer
from ray.data import DataContext, ExecutionResources
from transformers import AutoTokenizer

from loram.errors import UserError
from loram.packing import Packed
from pipelines.corpus import build_corpus, build_instruct
from pipelines.sample import CorpusConfig, InstructConfig, Reading
from pipelines.sources import SourceSpec, digest

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
END = 2  # SmolLM2's EOS


@pytest.fixture(scope="module")
def s3():
    """A bucket in a local S3 server, which this process and Ray's workers find by variables."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        yield client
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3):
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=short,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
        )
        yield
        ray.shutdown()


def run(root: Path, tokenizer: Path, fn, specs: list[SourceSpec], **settings):
    """A data step on sources: its directory below `root`, and its metrics."""
    root = Path(tempfile.mkdtemp(dir=root))
    out, work = root / "out", root / "work"
    out.mkdir()
    work.mkdir()
    sources = {f"source{n}": spec.path for n, spec in enumerate(specs)}
    parts = tuple(Reading(digest(s, None), s.weight, s.text, s.share) for s in specs)
    settings = {"sources": parts, "seq_len": 128, "max_bad_share": 0.01, "seed": 0} | settings
    config = (CorpusConfig if fn is build_corpus else InstructConfig)(**settings)
    place = {"tokenizer": str(tokenizer), "out": out, "work": work, "place": None}
    return out, fn(config, **place, **sources)


def run_with_one_cpu(*args, **settings):
    DataContext.get_current().execution_options.resource_limits = ExecutionResources(cpu=1)
    return run(*args, **settings)


@pytest.fixture
def step(cluster, smollm2, tmp_path):
    return partial(run, tmp_path, smollm2)


def texts(start: int, count: int) -> list[dict]:
    return [{"text": f"Text {start + n}: {'on and on ' * (n % 17)}end."} for n in range(count)]


def talks(count: int) -> list[dict]:
    answers = [f"It is {n}, {'of course ' * (n % 19)}sir." for n in range(count)]
    return [{"instruction": f"Say {n}.", "output": text} for n, text in enumerate(answers)]


def write_lines(path: Path, rows: list) -> SourceSpec:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return SourceSpec(str(path))


def answers(directory: Path, smollm2: Path) -> list[str]:
    """The answers in packed conversations."""
    packed, tokenizer = Packed(directory), AutoTokenizer.from_pretrained(smollm2)
    found = packed.fetch(range(packed.rows))
    ids, places = found["input_ids"].ravel(), found["position_ids"].ravel()
    starts = np.flatnonzero(places == 0)
    texts = [tokenizer.decode(part) for part in np.split(ids, starts[1:])]
    return [text.split("assistant\n")[1] for text in texts if "assistant\n" in text]


def wholes(directory: Path, smollm2: Path) -> list[str]:
    """The same for a corpus, where documents go on in the next row."""
    packed, tokenizer = Packed(directory), AutoTokenizer.from_pretrained(smollm2)
    ids = packed.fetch(range(packed.rows))["input_ids"].ravel()
    ends = np.flatnonzero(ids == END) + 1
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]


def same_bytes(first: Path, second: Path) -> bool:
    names = [sorted(p.relative_to(d) for p in d.rglob("*") if p.is_file()) for d in (first, second)]
    assert names[0] == names[1] and len(names[0]) >= 2
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names[0])


def test_corpus_from_several_places(step, s3, smollm2, tmp_path):
    """Local lines and parquet on S3, 3 to 1: exact, in a random order, equal on any machine."""
    local = write_lines(tmp_path / "a.jsonl", texts(0, 400))
    for number in range(3):
        file = tmp_path / "part.parquet"
        rows = texts(1000 + 100 * number, 100)
        pq.write_table(pa.Table.from_pylist(rows).rename_columns(["body"]), file, row_group_size=30)
        s3.upload_file(str(file), "corpus", f"web/{number}.parquet")
    remote = SourceSpec("s3://corpus/web", text="body")
    specs = [SourceSpec(local.path, weight=3.0), remote]

    # Rows of 8 tokens, so that little is left out at the end.
    settings = {"rows": 200, "held_out": 12, "seq_len": 8}
    out, metrics = step(build_corpus, specs, **settings)
    held_out, train = (wholes(out / name, smollm2) for name in ("held_out", "train"))
    assert metrics["held_out_rows"] == 12 and metrics["padding"] == 0 and metrics["rejected"] == 0
    assert not set(held_out) & set(train)
    # Two documents are not whole in either part: the one at the boundary and the last one.
    numbers = [int(text.split(":")[0].removeprefix("Text ")) for text in held_out + train]
    assert 198 <= len(set(numbers)) == len(numbers) <= 200
    assert 148 <= sum(number < 400 for number in numbers) <= 150
    assert all(text.endswith("end.") for text in train)
    assert abs(np.corrcoef(np.arange(len(numbers)), numbers)[0, 1]) < 0.25, "in no random order"

    # In a task that holds no CPU, with one CPU for the work, from another place: the same bytes.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = SourceSpec(str(moved / "other.jsonl"), weight=3.0)
    os.rename(local.path, copy.path)

    task = ray.remote(num_cpus=0)(run_with_one_cpu)
    again, metrics_again = ray.get(
        task.remote(tmp_path, smollm2, build_corpus, [copy, remote], **settings)
    )
    assert metrics_again == metrics and same_bytes(out, again)
    other, _ = step(build_corpus, [copy, remote], **settings, seed=1)
    assert not same_bytes(out, other)


def test_a_corpus_of_texts_and_conversations(step, smollm2, tmp_path):
    pq.write_table(pa.Table.from_pylist(talks(60)), tmp_path / "a.parquet")
    specs = [write_lines(tmp_path / "a.jsonl", texts(0, 60)), SourceSpec(f"{tmp_path}/*.parquet")]
    out, metrics = step(build_corpus, specs, rows=100, held_out=1, seq_len=64)
    assert metrics["padding"] == 0 and metrics["rejected"] == 0
    packed, tokenizer = Packed(out / "train"), AutoTokenizer.from_pretrained(smollm2)
    found = packed.fetch(range(packed.rows))
    whole = tokenizer.decode(found["input_ids"].ravel())
    assert 40 <= whole.count("user\nSay ") <= 50 and 40 <= whole.count("Text ") <= 50
    learnt = tokenizer.decode(found["labels"][found["labels"] != -100])
    assert "Say" not in learnt and learnt.count("sir.") >= 40 and learnt.count("end.") >= 40


def test_instructions_are_split_and_packed_whole(step, smollm2, tmp_path):
    spec = write_lines(tmp_path / "a.jsonl", talks(300))
    # Two steps at once, each in a task without a CPU: neither keeps the other from working.
    task = ray.remote(num_cpus=0)(run)
    settings = [{"rows": None, "held_out": 40}, {"rows": 100, "held_out": 40}]
    both = [task.remote(tmp_path, smollm2, build_instruct, [spec], **each) for each in settings]
    (out, metrics), (fewer, _) = ray.get(both)

    held_out, train = (answers(out / name, smollm2) for name in ("held_out", "train"))
    assert len(held_out) == 40 and len(train) == 260 and len({*held_out, *train}) == 300
    assert 0 < metrics["padding"] < 0.2 and metrics["truncated"] == 0
    assert (out / "train" / "packed.json").exists()
    assert not (out / "rejects.jsonl").exists()
    # Fewer rows: the same ones held out, and part of those trained on.
    assert same_bytes(out / "held_out", fewer / "held_out")
    assert set(answers(fewer / "train", smollm2)) < set(train)
    assert len(answers(fewer / "train", smollm2)) == 60

    # For evaluation alone: as many as there are.
    all_held_out, _ = step(build_instruct, [spec], rows=1000, held_out=1000)
    assert len(answers(all_held_out / "held_out", smollm2)) == 300
    with pytest.raises(UserError, match=r"^instruct.rows: found 301 rows from .* has 300 good"):
        step(build_instruct, [spec], rows=301, held_out=40)


def test_malformed_rows_are_replaced_and_written_down(step, smollm2, tmp_path):
    rows = texts(0, 300)
    rows[10:16] = [
        {"text": "  "},
        {"text": None},
        '{"text": "cut',
        "[]",
        {"body": ""},
        '{"text": "\\ud800"}',
    ]
    spec = write_lines(tmp_path / "a.jsonl", rows)
    out, metrics = step(build_corpus, [spec], rows=294, held_out=1, max_bad_share=0.02)
    assert metrics["rejected"] == 6
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rejects] == [11, 12, 13, 14, 15, 16]
    assert all(row["source"].endswith("/a.jsonl") for row in rejects)
    for row, reason in zip(
        rejects,
        ["empty", "NoneType", "no JSON", "but list", "'text' is NoneType", "surrogate"],
        strict=True,
    ):
        assert reason in row["reason"]
    found = wholes(out / "held_out", smollm2) + wholes(out / "train", smollm2)
    assert 288 <= len(found) <= 294 and not any("Text 12:" in text for text in found)

    with pytest.raises(UserError, match=r"^corpus.max_bad_share: found 6 malformed of 300 rows of"):
        step(build_corpus, [spec], rows=294, held_out=1, max_bad_share=0.019)
    (listed,) = [
        p
        for p in tmp_path.rglob("work/rejects.jsonl")
        if not (p.parents[1] / "out" / "rejects.jsonl").exists()
    ]
    assert len(listed.read_text().splitlines()) == 6
    with pytest.raises(UserError, match=r"^corpus.rows: found 295 rows from .* has 294 good ones"):
        step(build_corpus, [spec], rows=295, held_out=1, max_bad_share=0.02)


def test_answers_beyond_the_length_are_bad_rows(step, tmp_path):
    rows = talks(100)
    rows[7]["instruction"] = "Say nothing " * 99  # no answer within 128 tokens
    rows[8]["output"] = "It is long " * 99  # cut within its answer
    spec = write_lines(tmp_path / "a.jsonl", rows)
    out, metrics = step(build_instruct, [spec], rows=None, held_out=1)
    assert (metrics["rejected"], metrics["truncated"]) == (1, 1)
    assert "no token of an answer" in (out / "rejects.jsonl").read_text()


def test_sources_that_are_not_what_they_were(step, tmp_path):
    spec = write_lines(tmp_path / "a.jsonl", texts(0, 50))
    before = (Reading(digest(spec, None), spec.weight, spec.text, spec.share),)
    write_lines(tmp_path / "a.jsonl", texts(1, 50))
    with pytest.raises(UserError, match="a.jsonl, changed since"):
        step(build_corpus, [spec], rows=10, held_out=1, sources=before)
    whole = gzip.compress("\n".join(json.dumps(row) for row in texts(0, 5000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    cut = SourceSpec(str(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(UserError, match="^source: found .*cut.jsonl.gz, which cannot be read"):
        step(build_corpus, [cut], rows=10, held_out=1)
