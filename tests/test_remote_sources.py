"""s3:// and hf:// through their real clients, against servers on this machine."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from loram.errors import UserError
from pipelines.readers import read_rows
from pipelines.sources import SourceSpec, digest, list_files, peek

ROWS = [{"text": f"document {number}"} for number in range(500)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
REPOSITORY = "/datasets/someone/things"
COMMIT = "c" * 40


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


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that `HfFileSystem` reads with, for the files below `root`."""

    root: Path

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if re.fullmatch(rf"/api{REPOSITORY}(/revision/main)?", path):
            self.answer({"id": REPOSITORY[10:], "sha": COMMIT, "siblings": []})
        elif path.startswith(f"/api{REPOSITORY}/tree/main"):
            folder = self.root / path.removeprefix(f"/api{REPOSITORY}/tree/main").strip("/")
            recursive = "recursive=true" in self.path.lower()
            there = sorted(folder.rglob("*") if recursive else folder.glob("*"))
            self.answer([self.entry(file) for file in there]) if folder.is_dir() else self.missing()
        elif path.startswith(f"{REPOSITORY}/resolve/main/"):
            body = (self.root / path.removeprefix(f"{REPOSITORY}/resolve/main/")).read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self.send(
                body[int(asked[1]) : int(asked[2]) + 1] if asked else body, 206 if asked else 200
            )
        else:
            self.missing()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        paths = body["paths"] if isinstance(body["paths"], list) else [body["paths"]]
        there = [self.root / path for path in paths]
        self.answer([self.entry(file) for file in there if file.exists()])

    def entry(self, file: Path) -> dict:
        about = {"type": "directory", "oid": "d" * 40, "size": 0}
        if file.is_file():
            body = file.read_bytes()
            about = {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body)}
        return about | {"path": str(file.relative_to(self.root))}

    def answer(self, content: object) -> None:
        self.send(json.dumps(content).encode(), 200)

    def missing(self) -> None:
        known = self.path.startswith(f"/api{REPOSITORY}")
        self.send(b"{}", 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

    def send(self, body: bytes, status: int, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path):
    """A hub with one repository; its files and the address."""
    Hub.root = tmp_path / "repository"
    Hub.root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub.root, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOOK = """
import json, sys
from loram.errors import UserError
from pipelines.readers import read_rows
from pipelines.sources import SourceSpec, digest, list_files, peek
import numpy as np
whole, one, none, nowhere = (SourceSpec(path) for path in sys.argv[1:])
found = {"files": [[f.uri, f.size, f.stamp] for f in list_files(whole.path)]}
found["rows"] = [row.values for f in list_files(whole.path) for row in read_rows(f.uri)]
some = np.array([0, 333])
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


def test_hf(hub, tmp_path):
    """In processes of their own: the address of the hub is read when its client is imported."""
    root, address = hub
    (root / "data").mkdir()
    (root / "data" / "1.jsonl").write_bytes(LINES)
    pq.write_table(pa.Table.from_pylist(ROWS), root / "data" / "2.parquet", row_group_size=100)
    (root / "README.md").write_text("not data")
    source = "hf://" + REPOSITORY.strip("/")
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    paths = [source, f"{source}/data/*.parquet", f"{source}/other", "hf://datasets/some/where"]

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

    found = look()
    names = [uri.rpartition("/")[2] for uri, _, _ in found["files"]]
    assert names == ["1.jsonl", "2.parquet"]
    assert [stamp for _, _, stamp in found["files"]][0] == hashlib.sha1(LINES).hexdigest()
    assert found["rows"] == ROWS * 2 and found["peek"] == 1000
    assert found["some"] == [ROWS[0], ROWS[333]]
    assert len(found["refused"]) == 2
    assert all(text.startswith("corpus.sources: found hf://") for text in found["refused"])
    (root / "data" / "1.jsonl").write_bytes(LINES[:-1] + b" \n")
    assert look()["digest"] != found["digest"]
