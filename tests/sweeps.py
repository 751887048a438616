"""A small sweep in a process of its own, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.assets import home

ROOT = Path(__file__).parents[1]
SETTINGS = ["test", "align.steps=0", "nf4=false", "offset.every=2", "offset.parts=2"]
SWEEP = ["tune/sweep.py", *SETTINGS, "sft.lr=1e-4..1e-2", "prune.ratio=0.25,0.5", "--trials", "2"]
# The higher rate goes first, and the other, which is worse, is stopped early.
SWEEP += ["--concurrent", "1"]


@contextmanager
def start(words: list[str], root: Path, log: Path) -> Iterator[subprocess.Popen]:
    """The command in a session of its own, of which nothing is left at the end of the block."""
    root.mkdir(exist_ok=True)
    if not (root / "assets").exists():
        (root / "assets").symlink_to(home() / "assets")
    process = subprocess.Popen(
        [sys.executable, ROOT / words[0], *words[1:]],
        env=os.environ | {"LORAM_HOME": str(root)},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def records(root: Path) -> dict[str, str]:
    """When each finished step was started, by its entry's name."""
    found = (root / "store").glob("*/record.json")
    return {file.parent.name: json.loads(file.read_text())["started"] for file in found}


def killed_and_finished(root: Path) -> tuple[Path, dict[str, str], str]:
    """Run the sweep in `root`; its driver is killed in its second search, and started again.

    Returns:
        The home, what `records` were there at the kill, and what the second driver printed.
    """
    first, second = root / "first.log", root / "second.log"
    deadline = time.monotonic() + 500
    with start(SWEEP, root, first) as killed:
        while Counter(slug.split("-")[0] for slug in records(root))["evaluate_large"] < 2:
            assert killed.poll() is None and time.monotonic() < deadline, first.read_text()
            time.sleep(0.5)
    before = records(root)
    with start(SWEEP, root, second) as again:
        assert again.wait(600) == 0, second.read_text()
    return root, before, second.read_text()
