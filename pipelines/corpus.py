"""Data steps on Ray Data: choose rows, tokenise, pack, and set aside what is malformed.

Rows are ranked by a hash of (seed, source, file, row) and the lowest are taken, in the order of
their ranks: exactly as many as asked for, the same ones whatever the number of workers, and in a
random order. A file is read by one task, row by row; sorting is Ray Data's, which spills to disk;
packing is one pass that holds the rows it is filling.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from transformers import PreTrainedTokenizerBase

from loram.data import Document, encode_chat, encode_text
from loram.errors import UserError, refuse
from loram.formats import detect, to_messages
from loram.model import load_tokenizer
from loram.packing import best_fit, cut, scatter, write_packed
from pipelines.place import Place
from pipelines.sources import SourceSpec, files, is_text, lines
from pipelines.step import Metrics

REJECTS = "rejects.jsonl"
BLOCK = 512  # rows that a task hands on at a time
SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("rank", "source", "file", "line")),
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
        ("reason", pa.string()),  # why there is no document; empty for a good row
    ]
)


@dataclass(frozen=True)
class Reading:
    """How a source is read: a `SourceSpec` without its path, which is no part of a step's key."""

    weight: float
    text: str
    share: float


def readings(sources: Iterable[SourceSpec]) -> tuple[Reading, ...]:
    """The identity of the sources; their content enters the key through the step's inputs."""
    return tuple(Reading(source.weight, source.text, source.share) for source in sources)


@dataclass(frozen=True)
class CorpusConfig:
    """rows: documents, split over the sources by weight. held_out: packed rows not trained on."""

    sources: tuple[Reading, ...]
    rows: int
    held_out: int
    seq_len: int
    max_bad_share: float
    seed: int


@dataclass(frozen=True)
class InstructConfig:
    """rows: conversations, None for all. held_out: of those, the ones kept from training; as many
    as `rows` makes a set for evaluation alone, of fewer rows if there are not so many."""

    sources: tuple[Reading, ...]
    rows: int | None
    held_out: int
    seq_len: int
    max_bad_share: float
    seed: int


def build_corpus(
    config: CorpusConfig, *, tokenizer: str, out: Path, work: Path, place: Place, **sources: str
) -> Metrics:
    """Documents of general text -> out/train and out/held_out, packed without padding.

    Raises:
        UserError: too few good rows, or too many bad ones.
    """
    found = _Found(work / REJECTS, list(sources.values()))
    limits = _limits(config, sources, found)
    found.judge(config.max_bad_share, "corpus")
    documents = _documents(_read(config, sources, tokenizer, limits), None)
    pack = partial(write_packed, seq_len=config.seq_len, pad_id=_pad(tokenizer))
    # The document at the boundary is not continued in the training part.
    held_out = pack(out / "held_out", islice(cut(documents, config.seq_len), config.held_out))
    train = pack(out / "train", cut(documents, config.seq_len), rejected=found.bad)
    if not train["rows"]:
        refuse("corpus.held_out", f"{config.held_out}, which leaves nothing to train on", "fewer")
    found.keep(out)
    return _metrics(train, held_out)


def build_instruct(
    config: InstructConfig, *, tokenizer: str, out: Path, work: Path, place: Place, **sources: str
) -> Metrics:
    """Conversations -> out/train and out/held_out, packed whole by best fit.

    Raises:
        UserError: too few good rows, or too many bad ones.
    """
    found = _Found(work / REJECTS, list(sources.values()))
    documents = _documents(_read(config, sources, tokenizer, None), found)
    pack = partial(write_packed, seq_len=config.seq_len, pad_id=_pad(tokenizer))
    chosen = islice(documents, config.held_out)
    held_out = pack(out / "held_out", best_fit(chosen, config.seq_len))
    rest = islice(documents, None if config.rows is None else config.rows - config.held_out)
    train = pack(out / "train", best_fit(rest, config.seq_len))
    for _ in documents:
        pass  # the rest is looked at as well, so that the count of bad rows is of all rows
    found.judge(config.max_bad_share, "instruct")
    evaluation = config.rows == config.held_out
    if not evaluation and (not train["rows"] or found.good < (config.rows or 0)):
        asked = f"{config.rows or 'all'} rows with {config.held_out} held out"
        refuse("instruct.rows", f"{asked} of {found.good} good ones", "fewer")
    found.keep(out)
    return _metrics(train, held_out)


@dataclass
class _Found:
    """Counts good and bad rows, and writes the bad ones down as they come."""

    path: Path
    urls: list[str]
    good: int = 0
    bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.unlink(missing_ok=True)

    def reject(self, row: dict[str, Any]) -> None:
        self.bad += 1
        source = self.urls[row["source"]]
        line = {"source": source, "file": row["file"], "line": row["line"], "reason": row["reason"]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def judge(self, allowed: float, setting: str) -> None:
        share = self.bad / max(self.good + self.bad, 1)
        if share > allowed:
            refuse(
                f"{setting}.max_bad_share",
                f"{self.bad} malformed of {self.good + self.bad} rows ({share:.1%}; {self.path})",
                f"at most {allowed:.1%}",
            )

    def keep(self, out: Path) -> None:
        if self.bad:
            (out / REJECTS).write_bytes(self.path.read_bytes())


Config = CorpusConfig | InstructConfig


def _read(
    config: Config, sources: dict[str, str], tokenizer: str, limits: list[int] | None
) -> Iterator[dict[str, Any]]:
    """All rows with a rank up to their source's limit, encoded, in the order of their ranks."""
    dataset = _dataset(config, sources, tokenizer, limits)
    return dataset.sort(["rank", "source", "file", "line"]).iter_rows()


def _dataset(
    config: Config, sources: dict[str, str], tokenizer: str | None, limits: list[int] | None
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [
        {"source": number, "file": index, "url": url}
        for number, path in enumerate(sources.values())
        for index, url in enumerate(files(path, config.sources[number].share, config.seed))
    ]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _encode,
        batch_size=1,
        fn_kwargs={"config": config, "tokenizer": tokenizer, "limits": limits},
    )


def _encode(
    batch: dict[str, np.ndarray],
    config: Config,
    tokenizer: str | None,
    limits: list[int] | None,
) -> Iterator[pa.Table]:
    """One file -> tables of SCHEMA; without a tokenizer rows are judged and not encoded."""
    source, file, url = int(batch["source"][0]), int(batch["file"][0]), str(batch["url"][0])
    reading, chat = config.sources[source], isinstance(config, InstructConfig)
    opened = _tokenizer(tokenizer) if tokenizer else None
    rows = lines(url, None if chat else [reading.text])
    while block := list(islice(rows, BLOCK)):
        numbers = np.array([number for number, _, _ in block])
        ranks = (scatter(numbers, config.seed, source, file) >> np.uint64(1)).astype(np.int64)
        table = []
        for (number, row, reason), rank in zip(block, ranks.tolist(), strict=True):
            if limits is not None and rank > limits[source]:
                continue
            document = None
            if row is not None:
                try:
                    document = _document(row, config, reading, opened)
                except ValueError as error:
                    reason = str(error)
            entry = {"rank": rank, "source": source, "file": file, "line": number}
            ids, trained, truncated = document or (None, None, False)
            entry |= {"ids": ids, "trained": trained, "truncated": truncated, "reason": reason}
            table.append(entry)
        yield pa.Table.from_pylist(table, schema=SCHEMA)


def _document(
    row: dict[str, Any], config: Config, reading: Reading, opened: PreTrainedTokenizerBase | None
) -> Document | None:
    if isinstance(config, InstructConfig):
        try:
            form = detect(row)
        except UserError:
            raise ValueError("columns of no known form") from None
        messages = to_messages(row, form)
        return encode_chat(messages, opened, config.seq_len) if opened else None
    if not is_text(row.get(reading.text)):
        raise ValueError(f"no text in {reading.text!r}")
    return encode_text(row[reading.text], opened) if opened else None


def _documents(rows: Iterator[dict[str, Any]], found: _Found | None) -> Iterator[Document]:
    for row in rows:
        if not row["reason"]:
            if found:
                found.good += 1
            ids, trained = np.array(row["ids"], np.int32), np.array(row["trained"], bool)
            yield Document(ids, trained, row["truncated"])
        elif found:
            found.reject(row)


def _limits(config: CorpusConfig, sources: dict[str, str], found: _Found) -> list[int]:
    """The highest rank to take from each source, so that exactly `rows` good rows are taken."""
    total = sum(reading.weight for reading in config.sources)
    quotas = [int(config.rows * reading.weight / total) for reading in config.sources]
    quotas[0] += config.rows - sum(quotas)
    lowest = [np.empty(0, np.int64) for _ in quotas]
    counts = [0] * len(quotas)
    for table in _dataset(config, sources, None, None).iter_batches(batch_format="pyarrow"):
        bad = np.array(table["reason"].to_pylist(), dtype=object) != ""
        ranks, origin = table["rank"].to_numpy(), table["source"].to_numpy()
        for row in table.filter(pa.array(bad)).to_pylist():
            found.reject(row)
        for number, quota in enumerate(quotas):
            ours = ranks[(origin == number) & ~bad]
            counts[number] += len(ours)
            lowest[number] = np.sort(np.concatenate([lowest[number], ours]))[:quota]
    found.good = sum(counts)
    for number, (quota, count) in enumerate(zip(quotas, counts, strict=True)):
        if count < quota:
            refuse(
                "corpus.rows",
                f"{config.rows}, of which {quota} from {found.urls[number]} with {count} good rows",
                "no more than there are",
            )
    return [int(ranks[-1]) if len(ranks) else -1 for ranks in lowest]


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(path)


def _pad(tokenizer: str) -> int:
    opened = load_tokenizer(tokenizer)
    return int(opened.eos_token_id if opened.pad_token_id is None else opened.pad_token_id)


def _metrics(train: dict[str, Any], held_out: dict[str, Any]) -> Metrics:
    return {
        **{name: train[name] for name in ("rows", "tokens", "trained_tokens", "padding")},
        **{name: train[name] for name in ("truncated", "rejected")},
        "held_out_rows": held_out["rows"],
        "held_out_tokens": held_out["tokens"],
    }
