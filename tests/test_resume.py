"""Training that is killed at a random step ends as if it had not been."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import tiny_model
from rows import packed_rows

from loram.model import save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# A driver of its own, so that it can be killed with all that it started.
DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from loram.adapter import AdapterConfig
from loram.errors import UserError
from loram.train import TrainConfig
from pipelines.cluster import start_ray
from pipelines.fit import fit
from pipelines.place import Place

stage, workers, data, name, lr = sys.argv[1:]
data, config = Path(data), TrainConfig(
    steps=60, lr=float(lr), global_batch=8, seq_len=64, warmup_steps=3, eval_every=6, seed=1
)
start_ray()
try:
    print(json.dumps(fit(
        stage, model=data / "model", train=data / "train", held_out=data / "held_out",
        config=config, adapter=AdapterConfig() if stage == "sft" else None,
        place=Place(workers=int(workers), cpus_per_worker=1, micro_batch=2),
        out=data / name / "out", work=data / name / "work",
    )))
except UserError as error:
    print(json.dumps({"refused": str(error)}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    packed_rows(root / "train")
    packed_rows(root / "held_out", documents=15)
    save(tiny_model("llama").to(torch.bfloat16), root / "model")
    return root


def drive(
    data: Path, stage: str, workers: int, name: str, *kills: Callable, lr: float = 1e-2
) -> dict | None:
    """Run the driver; each of `kills(driver, curve)` is called once it is past a random step."""
    (data / name / "work").mkdir(parents=True, exist_ok=True)
    curve = data / name / "work" / "metrics.jsonl"
    with (data / name / "log").open("a") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, stage, str(workers), str(data), name, str(lr)],
            stdout=subprocess.PIPE,
            stderr=log,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        )
    for kill, after in zip(kills, sorted(random.sample(range(7, 40), len(kills))), strict=True):
        while not curve.exists() or f'"step": {after},' not in curve.read_text():
            assert driver.poll() is None, (data / name / "log").read_text()[-3000:]
            time.sleep(0.02)
        print(f"{name}: {kill.__name__} after step {after}")
        kill(psutil.Process(driver.pid), curve)
    out, _ = driver.communicate()
    return json.loads(out.splitlines()[-1]) if driver.returncode == 0 else None


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that has just ended, a zombie too
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_a_worker(driver: psutil.Process, curve: Path) -> None:
    before = curve.stat().st_ino
    random.choice(workers_of(driver)).kill()
    while curve.stat().st_ino == before:  # the next one goes on with a file of its own
        assert driver.is_running()
        time.sleep(0.02)


def kill_the_driver(driver: psutil.Process, curve: Path) -> None:
    workers = workers_of(driver)
    driver.kill()
    # The embedded Ray ends with it; until then its workers may still write.
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert workers and not alive


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir()}


def assert_equal_runs(data: Path, plain: str, name: str, workers: int) -> None:
    assert files(data / name / "out") == files(data / plain / "out")
    for file in ["metrics.jsonl", *(f"rows-{rank}.jsonl" for rank in range(workers))]:
        kept = []
        for run in (plain, name):
            lines = map(json.loads, (data / run / "work" / file).read_text().splitlines())
            names = ("step", "loss", "lr", "grad_norm", "held_out_loss", "rows")
            kept.append([{n: line[n] for n in names if n in line} for line in lines])
        assert kept[0] == kept[1]


def test_an_adapter_on_one_worker(data):
    plain = drive(data, "sft", 1, "plain")
    assert drive(data, "sft", 1, "killed", kill_a_worker, kill_the_driver) is None
    found = drive(data, "sft", 1, "killed")
    assert_equal_runs(data, "plain", "killed", 1)
    same = ("held_out_loss", "best_step", "tokens", "trained_tokens")
    assert [found[n] for n in same] == [plain[n] for n in same]

    # Trained to the end, killed before the step was entered into the store: nothing is trained.
    steps = (data / "killed" / "work" / "metrics.jsonl").read_bytes()
    for file in (data / "killed" / "out").iterdir():
        file.unlink()
    assert drive(data, "sft", 1, "killed")["best_step"] == found["best_step"]
    assert (data / "killed" / "work" / "metrics.jsonl").read_bytes() == steps
    assert_equal_runs(data, "plain", "killed", 1)


def test_alignment_divided_over_two_workers(data):
    assert drive(data, "align", 2, "whole")
    assert drive(data, "align", 2, "cut", kill_a_worker, kill_the_driver) is None
    assert drive(data, "align", 2, "cut")
    assert_equal_runs(data, "whole", "cut", 2)


def test_divergence_is_said_at_once(data):
    began = time.monotonic()
    found = drive(data, "sft", 1, "diverged", lr=1e30)
    assert "step" in found["refused"] and "lr" in found["refused"]
    curve = (data / "diverged" / "work" / "metrics.jsonl").read_text().splitlines()
    assert len(curve) < 6  # not tried again and again
    assert np.isfinite([json.loads(line)["loss"] for line in curve]).all()
    assert time.monotonic() - began < 300
