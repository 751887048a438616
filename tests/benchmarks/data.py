"""Tokenise-and-pack speed, padding, and peak memory at one and ten times the rows.

python -m tests.benchmarks.data
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import node_stats
from reasoning_gym import create_dataset

from pipelines.assets import MODEL, home
from pipelines.corpus import build_corpus, build_instruct
from pipelines.sample import CorpusConfig, InstructConfig, Reading
from pipelines.sources import SourceSpec, digest
from tests.benchmarks import keep

ROWS = 2000
CPUS = 2
ASSETS = home() / "assets"


def main() -> None:
    """Every size in a process and a Ray of its own: memory that was used once is not given back."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="loram") as name:
        for kind in ("corpus", "instruct"):
            for rows in (ROWS, 10 * ROWS):
                source = Path(name) / f"{kind}-{rows}.jsonl"
                write(kind, rows, source)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    keep("data", **fresh.submit(measured, kind, rows, source).result())


def write(kind: str, rows: int, path: Path) -> None:
    """C4 documents again and again, or as many arithmetic word problems."""
    with path.open("w") as file:
        if kind == "corpus":
            texts = (ASSETS / "c4.jsonl").read_text().splitlines()
            file.writelines(texts[row % len(texts)] + "\n" for row in range(rows))
            return
        for problem in create_dataset("gsm_symbolic", size=rows, seed=0):
            row = {"instruction": problem["question"], "output": problem["metadata"]["answer_cot"]}
            file.write(json.dumps(row) + "\n")


def measured(kind: str, rows: int, path: Path) -> dict[str, Any]:
    """One step over all rows of the file, after one over a few of them that starts the workers."""
    ray.init(
        address="local",
        num_cpus=CPUS,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(prefix="ray"),
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    step(kind, 64, path)
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, stopped)
        started = time.perf_counter()
        found = step(kind, rows, path)
        seconds = time.perf_counter() - started
        stopped.set()
        peaks = watching.result()
    ray.shutdown()
    tokens = found["tokens"] + found["held_out_tokens"]
    return {
        "kind": kind,
        "rows": rows,
        "cpus": CPUS,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "tokens_per_second": round(tokens / seconds),
        "padding": round(float(found["padding"]), 4),
        **{f"{name}_peak_mb": round(value / 1e6) for name, value in peaks.items()},
    }


def step(kind: str, rows: int, path: Path) -> dict[str, Any]:
    """The data step of this kind, on the default tokenizer, at 512 tokens."""
    spec = SourceSpec(str(path))
    parts = (Reading(digest(spec, None), spec.weight, spec.text, spec.share),)
    config, build = (
        (CorpusConfig, build_corpus) if kind == "corpus" else (InstructConfig, build_instruct)
    )
    with tempfile.TemporaryDirectory() as name:
        out, work = Path(name) / "out", Path(name) / "work"
        out.mkdir()
        work.mkdir()
        return build(
            config(parts, rows, held_out=4, seq_len=512, max_bad_share=0.01, seed=0),
            tokenizer=str(ASSETS / MODEL),
            out=out,
            work=work,
            place=None,
            source0=str(path),
        )


def watch(stopped: threading.Event) -> dict[str, int]:
    """Peaks of the bytes of this process, of all its Ray workers, and of objects in Ray's store."""
    peaks = {"driver": 0, "workers": 0, "object_store": 0}
    driver, node = psutil.Process(), ray.nodes()[0]
    while not stopped.wait(0.25):
        workers = 0
        for process in driver.children(recursive=True):
            try:
                if process.name().startswith("ray::"):
                    memory = process.memory_info()
                    workers += memory.rss - memory.shared
            except psutil.Error:
                continue  # it ended meanwhile
        memory = driver.memory_info()
        now = {
            "driver": memory.rss - memory.shared,
            "workers": workers,
            "object_store": store_bytes(node),
        }
        for name, value in now.items():
            peaks[name] = max(peaks[name], value)
    return peaks


def store_bytes(node: dict[str, Any]) -> int:
    """Bytes of all objects in a node's object store."""
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    return int(stats.store_stats.object_store_bytes_used)


if __name__ == "__main__":
    main()
