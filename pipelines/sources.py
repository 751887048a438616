"""Sources of rows: what they are, which files they consist of, and the digest of their content.

A source is a file, a directory, or a pattern with *, local or under s3:// or hf://. Credentials and
endpoints come from the usual variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, HF_TOKEN, HF_ENDPOINT,
and so on).
"""

import codecs
import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from loram.errors import refuse
from loram.formats import detect, known_form, to_messages
from loram.packing import scatter
from pipelines.digest import file_digest, read_digest
from pipelines.readers import SUFFIXES, Row, kind, opened, parquet_columns, read_rows

KINDS = "parquet (.parquet), JSON (.jsonl, .json), text (.txt); the latter also as .gz, .bz2, .xz"
HEAD = 1 << 16  # bytes looked at, at both ends of a file


@dataclass(frozen=True)
class SourceSpec:
    """A source as a recipe names it.

    path: file, directory or pattern; s3:// and hf://datasets/ too. weight: its part of the rows,
    relative to the other sources. text: the column of a corpus; one without it may hold
    conversations, which like instructions are recognised by their columns. share: at most this part
    of its bytes is read, from files chosen by the seed.
    """

    path: str
    weight: float = 1.0
    text: str = "text"
    share: float = 1.0


class Form(NamedTuple):
    """How rows hold what is read: as conversations of this form (`loram.formats`), or as text in
    the column of this name."""

    name: str
    chat: bool


@dataclass(frozen=True)
class File:
    """uri: full, with protocol. size: bytes. stamp: ETag or blob id, "" for a local file."""

    uri: str
    size: int
    stamp: str


def list_files(path: str, setting: str = "source") -> list[File]:
    """All files of a source, in the order of their names.

    Raises:
        UserError: nothing is there, or nothing of a known kind.
    """
    scheme = path.partition("://")[0] if "://" in path else "file"
    if scheme not in ("file", "s3", "hf"):
        refuse(setting, path, "a local path, s3://, hf://")
    try:
        system, root = fsspec.core.url_to_fs(path)
        system.invalidate_cache()  # remote listings are remembered; files may have changed
        found = system.glob(root, detail=True) if "*" in root else system.find(root, detail=True)
    except Exception as error:  # each file system's client has its own
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        refuse(setting, f"{path}, which cannot be listed ({reason})", "a source within reach")
    infos = [i for _, i in sorted(found.items()) if i["type"] == "file" or i.get("islink")]
    if not infos:
        refuse(setting, f"{path}, where no file is", "an existing file, directory or pattern")
    # Links count as what they lead to: the hub's cache consists of them. Editors' locks are links.
    known = [i for i in infos if i["name"].endswith(SUFFIXES) and "/.#" not in i["name"]]
    for link in (Path(info["name"]) for info in known if info.get("islink")):
        if not link.is_file():
            refuse(setting, f"{link}, a link to no file", "files, and links to files")
    if not known:
        refuse(setting, f"{path}, with no file of a known kind", KINDS)
    return [File(system.unstrip_protocol(i["name"]), int(i["size"]), _stamp(i)) for i in known]


def choose_files(files: list[File], share: float, *salt: int) -> list[File]:
    """Files of at most this share of all bytes, chosen by the salt, in the order of their names.

    Raises:
        UserError: the share is smaller than every file.
    """
    if share == 1:
        return files
    room, chosen = share * sum(file.size for file in files), []
    for number in np.argsort(scatter(np.arange(len(files)), *salt), kind="stable"):
        if files[number].size <= room:
            room -= files[number].size
            chosen.append(int(number))
    if not chosen:
        smallest = min(file.size for file in files) / sum(file.size for file in files)
        refuse("share", f"{share}, less than the smallest file", f"{smallest:.3g} or more")
    return [files[number] for number in sorted(chosen)]


def digest(spec: SourceSpec, cache: Path | None) -> str:
    """Hex SHA-256 of a source's content, in the order of its files.

    Local files count by their bytes, s3:// by ETag and size, hf:// by the hub's blob ids; of their
    names the suffix does, by which they are read.

    Args:
        cache: where the digests of local files are remembered; None: read every byte now.

    Raises:
        UserError: the source cannot be read.
    """
    total = hashlib.sha256()
    for file in list_files(spec.path):
        stamp = file.stamp
        if not stamp:
            local = Path(file.uri.removeprefix("file://"))
            stamp = file_digest(local, cache) if cache else read_digest(local)
        total.update(f"{stamp} {file.size} {kind(file.uri)}\n".encode())
    return total.hexdigest()


def peek(spec: SourceSpec, setting: str, *, chat: bool, rows: int = 1000) -> list[Any]:
    """Look at headers and at the first rows: what can be refused before anything starts.

    Of a remote source the first file is opened, of a local one every file.

    Args:
        setting: the recipe key, for the message.
        chat: instructions rather than text.
        rows: how many to look at.

    Returns:
        The good ones among them: texts, or conversations as `loram.formats.Message` lists.

    Raises:
        UserError: a missing, empty, truncated or non-text file; a missing column; no good row; a
            share that no file is within.
    """
    files = list_files(spec.path, setting)
    choose_files(files, spec.share)  # whichever they will be
    for file in files if not files[0].stamp else files[:1]:
        _check_file(file, setting)
    form = find_form(files, spec, setting, chat=chat)
    good, reasons = [], []
    for row in itertools.islice(itertools.chain(*(read_rows(f.uri) for f in files)), rows):
        try:
            good.append(content(row, form))
        except ValueError as error:
            reasons.append(f"row {row.number + 1}: {error}")
    if not good:
        found = f"{spec.path}, where none of the first {len(reasons)} rows is good ({reasons[0]})"
        refuse(setting, found, "instructions with answers" if form.chat else "rows with text")
    return good


def find_form(files: list[File], spec: SourceSpec, setting: str, *, chat: bool) -> Form:
    """That of the source's rows; of a corpus text goes before conversations.

    Raises:
        UserError: the columns of the first row fit neither.
    """
    columns: list[str] = []
    if files[0].uri.endswith(".parquet"):
        columns = parquet_columns(files[0].uri)
    else:
        rows = itertools.islice(itertools.chain(*(read_rows(file.uri) for file in files)), 1000)
        for row in rows:
            if row.values is not None:
                columns = list(row.values)
                break
        else:
            refuse(setting, f"{spec.path}, with no readable row at its start", KINDS)
    if not chat and spec.text in columns:
        return Form(spec.text, False)
    if chat or known_form(columns):
        return Form(detect(columns, f"{setting}: {spec.path}"), True)
    found, names = f"no column {spec.text!r} in {spec.path}", ", ".join(map(repr, columns))
    refuse(f"{setting}: text", found, f"one of {names}, or the columns of conversations")


def content(row: Row, form: Form) -> Any:
    """The row's text, or its conversation as `loram.formats.Message`s.

    Raises:
        ValueError: the row is malformed; the text is a short reason.
    """
    if row.values is None:
        raise ValueError(row.reason)
    if form.chat:
        return to_messages(row.values, form.name)
    text = row.values.get(form.name)
    if not isinstance(text, str):
        raise ValueError(f"{form.name!r} is {type(text).__name__}, no text")
    if not text.strip():
        raise ValueError("empty text")
    return text


def _check_file(file: File, setting: str) -> None:
    """Refuse a file that is empty, of another kind than its name says, or cut off."""
    if not file.size:
        refuse(setting, f"{file.uri}, which is empty", KINDS)
    if file.uri.endswith(".parquet"):
        parquet_columns(file.uri)  # opening reads the footer, which a truncated file lacks
        return
    with opened(file.uri) as stream:
        head = stream.read(HEAD)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
        except UnicodeDecodeError as error:
            refuse(setting, f"{file.uri}, no UTF-8 text at byte {error.start}", KINDS)
    if b"\0" in head:
        refuse(setting, f"{file.uri}, no text: it holds zero bytes", KINDS)
    if file.uri.endswith((".jsonl", ".json")) and file.size > 1:
        _check_end(file, setting, array=head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[")


def _check_end(file: File, setting: str, *, array: bool) -> None:
    with fsspec.open(file.uri, "rb") as stream:
        stream.seek(max(0, file.size - HEAD))
        tail = stream.read().rstrip()
    if array:
        whole = tail.endswith(b"]")
    else:
        *before, last = tail.split(b"\n")
        whole = last.endswith(b"}") or (not before and len(tail) == HEAD)
    if not whole:
        refuse(setting, f"{file.uri}, cut off: its last row does not end", "a whole file")


def _stamp(info: dict[str, Any]) -> str:
    lfs = info.get("lfs") or {}
    return str(lfs.get("sha256") or info.get("blob_id") or info.get("ETag") or "").strip('"')
