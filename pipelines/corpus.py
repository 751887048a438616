"""Data steps on Ray Data: choose rows, tokenise them, pack them, set aside what is malformed.

First all rows are numbered, which reads no more than headers of parquet files and the line ends of
others; `sample.py` says which ones are taken. Then tasks read these and tokenise them, in whatever
order they finish; `spool.py` puts the documents into the order of their ranks. Packing is one pass.
What comes out does not depend on the number of workers.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from loram.data import Document, load_tokenizer, pad_id
from loram.errors import UserError, refuse
from loram.model import read_config
from loram.packing import best_fit, cut, write_packed
from pipelines.execute import CURVE
from pipelines.place import Place
from pipelines.reading import number, read
from pipelines.sample import (
    Config,
    CorpusConfig,
    InstructConfig,
    Sample,
    check_bad,
    check_count,
    first,
    lowest,
    mixed,
    quotas,
    with_spares,
)
from pipelines.sources import File, Form, SourceSpec, choose_files, digest, find_form, list_files
from pipelines.spool import SCHEMA, read_spool, write_spool
from pipelines.step import Metrics
from pipelines.tokenise import tokenise

REJECTS = "rejects.jsonl"
BLOCK_BYTES = 1 << 22  # of text that one task tokenises
READERS = 2  # files read at a time
AHEAD = 4  # blocks for each CPU that may lie in Ray's object store
EVERY_S = 2.0  # a line of progress


def build_corpus(
    config: CorpusConfig, *, tokenizer: str, out: Path, work: Path, place: Place, **sources: str
) -> Metrics:
    """Texts and conversations -> out/train and out/held_out, packed without padding.

    No document is in both. Of a conversation the answers are trained. Malformed rows go to
    out/rejects.jsonl.

    Args:
        tokenizer: model directory or hub id.
        sources: source0, source1, ...: their paths, in the order of the config's.

    Raises:
        UserError: too few good rows, too many malformed ones (named in work/rejects.jsonl), a
            damaged file, or a source that is not what its digest says.
    """
    pack = partial(write_packed, seq_len=config.seq_len, pad_id=_pad_id(tokenizer))
    documents, rejected = _encoded(config, tokenizer, list(sources.values()), work)
    held_out = pack(out / "held_out", islice(cut(documents, config.seq_len), config.held_out))
    train = pack(out / "train", cut(documents, config.seq_len), rejected=rejected)
    if not train["rows"]:
        refuse("corpus.held_out", f"{config.held_out}, which leaves nothing to train on", "fewer")
    return _finished(train, held_out, out, work)


def build_instruct(
    config: InstructConfig, *, tokenizer: str, out: Path, work: Path, place: Place, **sources: str
) -> Metrics:
    """Conversations -> out/train and out/held_out, packed whole by best fit.

    Arguments and errors as for `build_corpus`.
    """
    pack = partial(write_packed, seq_len=config.seq_len, pad_id=_pad_id(tokenizer))
    documents, rejected = _encoded(config, tokenizer, list(sources.values()), work)
    chosen = islice(documents, config.held_out)
    held_out = pack(out / "held_out", best_fit(chosen, config.seq_len))
    train = pack(out / "train", best_fit(documents, config.seq_len), rejected=rejected)
    if not train["rows"] and config.setting != "evaluate":
        refuse("instruct.held_out", f"{config.held_out}, which leaves nothing to train on", "fewer")
    return _finished(train, held_out, out, work)


def _encoded(
    config: Config, tokenizer: str, paths: list[str], work: Path
) -> tuple[Iterator[Document], int]:
    """The documents asked for, in the order of their ranks, and how many rows were malformed."""
    chat = isinstance(config, InstructConfig)
    specs, files, forms = [], [], []
    for source, (path, reading) in enumerate(zip(paths, config.sources, strict=True)):
        spec = SourceSpec(path, reading.weight, reading.text, reading.share)
        if digest(spec, None) != reading.digest:
            refuse("source", f"{path}, changed since the run began", "what it was; run again")
        specs.append(spec)
        files.append(choose_files(list_files(path), spec.share, config.seed, source))
        forms.append(find_form(files[source], spec, config.setting, chat=chat))
    limits = quotas(config.rows, [spec.weight for spec in specs], f"{config.setting}.rows")
    spares = [with_spares(limit, config.max_bad_share) for limit in limits]
    sample = mixed(lowest(_numbered(files, config.seed, spares), spares))
    for source, path in enumerate(paths):
        check_count(config, path, int((sample.source == source).sum()), limits[source])
    (work / REJECTS).unlink(missing_ok=True)
    shutil.rmtree(work / "spool", ignore_errors=True)
    good = np.ones(len(sample), bool)
    tables = _tokenised(files, forms, sample, tokenizer, config.seq_len if chat else None)
    write_spool(_watched(tables, sample, files, good, work), work / "spool")
    for source, path in enumerate(paths):
        of_source = good[sample.source == source]
        check_bad(config, path, of_source, work / REJECTS)
        check_count(config, path, int(of_source.sum()), limits[source])
    used = first(good, sample, limits)
    documents = (document for rank, document in read_spool(work / "spool") if used[rank])
    return documents, int((~good).sum())


def _numbered(files: list[list[File]], seed: int, limits: list[int | None]) -> Iterator[Sample]:
    """The ranks of all rows, of each file the lowest ones up to its source's limit."""
    items = [
        {"source": source, "file": index, "uri": file.uri}
        for source, chosen in enumerate(files)
        for index, file in enumerate(chosen)
    ]
    numbered = _dataset(items).map_batches(
        number, batch_size=1, fn_kwargs={"seed": seed, "limits": limits}
    )
    for table in numbered.iter_batches(batch_size=None, batch_format="pyarrow"):
        _raise_failure(table)
        yield Sample(*(table[name].to_numpy() for name in ("key", "source", "file", "number")))


def _tokenised(
    files: list[list[File]], forms: list[Form], sample: Sample, tokenizer: str, seq_len: int | None
) -> Iterator[pa.Table]:
    """Tables of spool.SCHEMA with `reason`, null for a good row, in no order; conversations of at
    most seq_len tokens."""
    order = np.lexsort((sample.number, sample.file, sample.source))
    starts = np.flatnonzero(
        np.diff(sample.source[order], prepend=-1) | np.diff(sample.file[order], prepend=-1)
    )
    items = []
    for ranks in np.split(order, starts[1:]):
        source, file = sample.source[ranks[0]], sample.file[ranks[0]]
        name, chat = forms[source]
        item = {"uri": files[source][file].uri, "form": name, "chat": chat}
        items.append(item | {"ranks": ranks.tobytes(), "numbers": sample.number[ranks].tobytes()})
    # Readers ask for no CPU: a waiting one must not keep tokenisation, which makes room, from it.
    readers = ray.data.TaskPoolStrategy(size=min(READERS, len(items)))
    contents = _dataset(items).map_batches(read, batch_size=1, num_cpus=0, compute=readers)
    tokenised = contents.map_batches(
        tokenise,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"tokenizer": tokenizer, "seq_len": seq_len},
    )
    for table in tokenised.iter_batches(batch_size=None, batch_format="pyarrow"):
        _raise_failure(table)
        yield table


def _watched(
    tables: Iterable[pa.Table],
    sample: Sample,
    files: list[list[File]],
    good: np.ndarray,
    work: Path,
) -> Iterator[pa.Table]:
    """The good rows of the tables; `good` is set false at the ranks of the others, which are
    written down; progress goes into the step's curve."""
    rejects: list[tuple[int, int, int, str]] = []
    done, started, told = 0, time.time(), 0.0
    with (work / CURVE).open("w", buffering=1) as curve:
        for table in tables:
            bad = table.filter(pc.is_valid(table["reason"]))
            places = bad["rank"].to_numpy()
            good[places] = False
            where = (
                column[places].tolist() for column in (sample.source, sample.file, sample.number)
            )
            rejects += zip(*where, bad["reason"].to_pylist(), strict=True)
            done, now = done + len(table), time.time()
            if now - told > EVERY_S or done == len(sample):
                line = {"step": done, "rows_per_second": done / (now - started), "time": now}
                curve.write(json.dumps(line) + "\n")
                told = now
            yield table.filter(pc.is_null(table["reason"])).select(SCHEMA.names)
    with (work / REJECTS).open("w") as report:
        for source, index, row, reason in sorted(rejects):
            entry = {"source": files[source][index].uri, "line": row + 1, "reason": reason}
            report.write(json.dumps(entry) + "\n")


def _raise_failure(table: pa.Table) -> None:
    failures = table["failure"].drop_null()
    if len(failures):
        raise UserError(failures[0].as_py())


def _dataset(items: list[dict[str, Any]]) -> ray.data.Dataset:
    """One item a task, run without a word."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    room = AHEAD * BLOCK_BYTES * ray.cluster_resources().get("CPU", 1.0)
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=room)
    with ray.data.DataContext.current(context):
        return ray.data.from_items(items, override_num_blocks=len(items))


def _pad_id(model: str) -> int:
    return pad_id(load_tokenizer(model), read_config(model).vocab_size)


def _finished(train: dict[str, Any], held_out: dict[str, Any], out: Path, work: Path) -> Metrics:
    if train["rejected"]:
        shutil.copyfile(work / REJECTS, out / REJECTS)
    names = ("rows", "tokens", "trained_tokens", "padding", "truncated", "rejected")
    return {
        **{name: train[name] for name in names},
        "held_out_rows": held_out["rows"],
        "held_out_tokens": held_out["tokens"],
    }
