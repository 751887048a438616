"""s3:// and hf:// through their real clients, against servers on this machine."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from loram.errors import UserError
from pipelines.readers import read_rows
from pipelines.sources import SourceSpec, digest, list_files, peek
from tests.hub import serving

ROWS = [{"text": f"document {number}"} for number in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def s3(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # of servers that are gone
    client = boto3.client("s3")
    client.create_bucket(Bucket="things")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3):
    s3.put_object(Bucket="things", Key="a/1.jsonl.gz", Body=gzip.compress(LINES))
    s3.put_object(Bucket="things", Key="a/2.jsonl", Body=LINES)
    s3.put_object(Bucket="things", Key="a/readme.md", Body=b"not data")
    for path, count in (
        ("s3://things/a", 2),
        ("s3://things/a/*.gz", 1),
        ("s3://things/a/2.jsonl", 1),
    ):
        files = list_files(path)
        assert len(files) == count and all(file.stamp and file.size for file in files)
        assert [row.values for file in files for row in read_rows(file.uri)] == ROWS * count
        assert len(peek(SourceSpec(path), "corpus.sources", chat=False)) == 500 * count
    before = digest(SourceSpec("s3://things/a"), None)
    assert before == digest(SourceSpec("s3://things/a"), None)
    s3.put_object(Bucket="things", Key="a/2.jsonl", Body=LINES.replace(b"499", b"998"))
    assert digest(SourceSpec("s3://things/a"), None) != before
    for path, found in (
        ("s3://things/b", "where no file is"),
        ("s3://nothing/a", "bucket does not exist"),
        ("s3://things/a/readme.md", "no file of a known kind"),
    ):
        with pytest.raises(UserError, match=rf"^corpus.sources: found {path}.*{found}"):
            peek(SourceSpec(path), "corpus.sources", chat=False)


LOOK = """
import json, sys
from loram.errors import UserError
from pipelines.readers import read_rows
from pipelines.sources import SourceSpec, digest, list_files, peek
import numpy as np
whole, one, other, none, nowhere = (SourceSpec(path) for path in sys.argv[1:])
found = {"files": [[f.uri, f.size, f.stamp] for f in list_files(whole.path)]}
found["rows"] = [row.values for f in list_files(whole.path) for row in read_rows(f.uri)]
some = np.array([0, 333])
found["converted"] = [row.values for f in list_files(other.path) for row in read_rows(f.uri)]
found["some"] = [row.values for row in read_rows(list_files(one.path)[0].uri, some)]
found["peek"] = len(peek(whole, "corpus.sources", chat=False))
found["digest"] = digest(whole, None)
found["refused"] = []
for spec in (none, nowhere):
    try:
        peek(spec, "corpus.sources", chat=False)
    except UserError as error:
        found["refused"].append(str(error))
print(json.dumps(found))
"""


def test_hf(tmp_path):
    """In processes of their own: the address of the hub is read when its client is imported."""
    root = tmp_path / "datasets" / "someone" / "things" / ("c" * 40)
    (root / "data").mkdir(parents=True)
    (root / "data" / "1.jsonl").write_bytes(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), root / "data" / "2.parquet", row_group_size=100)
    (root / "README.md").write_text("not data")
    converted = root.parent / "refs" / "convert" / "parquet" / "default" / "train"
    converted.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS[:9]), converted / "0000.parquet")
    source = "hf://datasets/someone/things"
    paths = [source, f"{source}/data/*.parquet", f"{source}@refs/convert/parquet"]
    paths += [f"{source}/other", "hf://datasets/some/where"]

    def look() -> dict:
        done = subprocess.run(
            [sys.executable, "-c", LOOK, *paths],
            env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    with serving(tmp_path) as variables:
        found = look()
        (root / "data" / "1.jsonl").write_bytes(LINES[:-1] + b" \n")
        changed = look()
        (root.parent / "gated").touch()
        words = [f'corpus.sources=[{{"path": "{source}"}}]']
        gated = subprocess.run(
            [sys.executable, "-m", "pipelines.full", "test", *words],
            env=os.environ | variables,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    assert gated.returncode == 2 and gated.stderr.count("\n") == 1
    assert "to which there is no access" in gated.stderr and "HF_TOKEN" in gated.stderr
    names = [uri.rpartition("/")[2] for uri, _, _ in found["files"]]
    assert names == ["1.jsonl", "2.parquet"]
    assert [stamp for _, _, stamp in found["files"]][0] == hashlib.sha1(LINES).hexdigest()
    assert found["rows"] == ROWS * 2 and found["peek"] == 1000
    assert found["some"] == [ROWS[0], ROWS[333]] and found["converted"] == ROWS[:9]
    assert len(found["refused"]) == 2
    assert all(text.startswith("corpus.sources: found hf://") for text in found["refused"])
    assert changed["digest"] != found["digest"]
