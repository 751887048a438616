"""A hub on this machine: the routes that huggingface_hub reads repositories with."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    """Serves `root/<models or datasets>/<owner>/<name>/<commit or branch>/...`; `main` is the last
    commit, by name. With a file `gated` beside its commits it gives files only for a token."""

    def __init__(self, root: Path, *rest) -> None:
        self.root = root
        super().__init__(*rest)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if asked := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if commit := self.commit(asked[1], asked[2], asked[3]):
                files = sorted(f for f in commit.rglob("*") if f.is_file())
                there = [
                    {"rfilename": str(file.relative_to(commit)), "size": file.stat().st_size}
                    for file in files
                ]
                self.answer({"id": asked[2], "sha": commit.name, "siblings": there})
        elif asked := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            if commit := self.commit(asked[1], asked[2], asked[3]):
                folder = commit / unquote(asked[4] or "")
                deep = "recursive=true" in self.path.lower()
                if folder.is_dir():
                    there = sorted(folder.rglob("*") if deep else folder.glob("*"))
                    self.answer([self.entry(file, commit) for file in there])
                else:
                    self.refuse(404, "EntryNotFound")
        elif asked := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if commit := self.commit("datasets" if asked[1] else "models", asked[2], asked[3]):
                self.file(commit / unquote(asked[4]), commit)
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Some paths' entries."""
        asked = re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/paths-info/([^/]+)", self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked and (commit := self.commit(asked[1], asked[2], asked[3])):
            paths = body["paths"] if isinstance(body["paths"], list) else [body["paths"]]
            there = [commit / path for path in paths]
            self.answer([self.entry(file, commit) for file in there if file.exists()])

    def commit(self, kind: str, name: str, revision: str | None) -> Path | None:
        """The directory of a commit; None, and an answer that says so, where there is none."""
        commits = sorted((self.root / kind / name).glob("[0-9a-f]" * 40))
        if not commits:
            self.refuse(404, "RepoNotFound")
            return None
        if revision is None or revision == "main":
            return commits[-1]
        found = self.root / kind / name / unquote(revision)
        if not found.is_dir():
            self.refuse(404, "RevisionNotFound")
            return None
        return found

    def file(self, file: Path, commit: Path) -> None:
        if (commit.parent / "gated").exists() and "Authorization" not in self.headers:
            self.refuse(401, "GatedRepo")
        elif not file.is_file():
            self.refuse(404, "EntryNotFound")
        else:
            body = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit.name}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), int(asked[2] or len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                self.send(body[first : last + 1], 206, headers)
            else:
                self.send(body, 200, headers)

    def entry(self, file: Path, commit: Path) -> dict:
        about = {"type": "directory", "oid": "d" * 40, "size": 0}
        if file.is_file():
            body = file.read_bytes()
            about = {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body)}
        return about | {"path": str(file.relative_to(commit))}

    def answer(self, content: object) -> None:
        self.send(json.dumps(content).encode(), 200)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", status, {"X-Error-Code": code})

    def send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[dict[str, str]]:
    """A hub of what lies below `root`; the variables by which a process uses it and no other."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield {"HF_ENDPOINT": address, "HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "0"}
    server.shutdown()
    server.server_close()
