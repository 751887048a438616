"""Sweeps in which something is killed, fails or disappears, on a cluster that outlives them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.clusters import head, until

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = ["test", "align.steps=0", "nf4=false", "prune.ratio=0.5", "sft.eval_every=4"]
SETTINGS += ["place.cpus_per_worker=2"]  # one trial at a time
# The second is an adapter that no machine has memory for.
FAILING = ["adapter.r=4,4000000000000", "--trials", "2"]


@dataclass
class Cluster:
    """A Ray of its own with two CPUs, and a home that its jobs share."""

    root: Path
    env: dict[str, str]
    began: float = 0.0

    @contextmanager
    def start(self, *words: str) -> Iterator[subprocess.Popen]:
        """A sweep that is gone at the end of the block; what it prints goes to `log`."""
        command = [sys.executable, ROOT / "tune" / "sweep.py", *SETTINGS, *words]
        self.began = time.time()
        with (self.root / "log").open("w") as log:
            sweep = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield sweep
        finally:
            sweep.kill()
            sweep.wait()

    def log(self) -> str:
        return (self.root / "log").read_text()

    def process(self, title: str) -> int | None:
        """The id of a process of this cluster, by the start of its title."""
        mine = f"LORAM_HOME={self.root}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "cmdline").read_text()
                if text.startswith(title) and mine in (folder / "environ").read_bytes():
                    return int(folder.name)
            except OSError:
                continue
        return None

    def trains(self, sweep: subprocess.Popen) -> bool:
        """A training of it did a step just now: Ray knows all that it will get back."""
        assert sweep.poll() is None, self.log()
        since = max(self.began, time.time() - 3)
        curves = (self.root / "store" / "work").glob("sft-*/metrics.jsonl")
        with suppress(FileNotFoundError):  # a training that has just ended
            return any(curve.stat().st_mtime > since for curve in curves)
        return False

    def runs(self) -> list[Any]:
        client = MlflowClient(f"sqlite:///{self.root}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("loram")
        return list(client.search_runs([experiment.experiment_id], max_results=1000))

    def held(self) -> str:
        """What is not back, and who has it; the open runs; empty if there is nothing."""
        found = subprocess.run([sys.executable, "-c", HELD], env=self.env, capture_output=True)
        open_runs = [r.info.run_name for r in self.runs() if r.info.status == "RUNNING"]
        text = found.stdout.decode() + "".join(f"run {name} is open\n" for name in open_runs)
        if found.returncode:
            text += f"exit status {found.returncode}\n{found.stderr.decode()[-2000:]}"
        return text


# Prints nothing if all resources of the cluster are available.
HELD = """
import ray
from ray.util.state import list_actors, list_jobs, list_placement_groups, list_tasks
ray.init(log_to_driver=False, logging_level="ERROR")
free, every = ray.available_resources(), ray.cluster_resources()
if free != every:
    print("free", free, "of", every)
    for group in list_placement_groups(detail=True):
        if group.state != "REMOVED":
            print("group", group)
    for actor in list_actors(filters=[("state", "!=", "DEAD")]):
        print("actor", actor)
    for task in list_tasks(filters=[("state", "=", "RUNNING")]):
        print("task", task)
    for job in list_jobs():
        print("job", job.job_id, job.status)
"""


def clean(cluster: Cluster, limit_s: float) -> None:
    """Wait until all resources are back and no run is open."""
    end = time.monotonic() + limit_s
    while held := cluster.held():
        assert time.monotonic() < end, held


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    root, short = tmp_path_factory.mktemp("failures"), Path("/tmp") / f"lf{os.getpid()}"
    with head(root, short, RAY_AUTH_MODE="disabled") as (address, _, env):
        yield Cluster(root, env | {"RAY_ADDRESS": address})


@pytest.fixture(scope="module")
def failed(cluster) -> list[dict[str, Any]]:
    """The trials of a sweep of which one fails; of the other the training's worker is killed."""
    with cluster.start(*FAILING) as sweep:
        os.kill(until(lambda: cluster.process("ray::RayTrainWorker")), signal.SIGKILL)
        assert sweep.wait(500) == 0, cluster.log()
    (file,) = (cluster.root / "store" / "reports").glob("*/trials.json")
    return list(json.loads(file.read_text()))


def test_what_fails_has_a_reason_and_the_killed_trial_its_numbers(failed):
    good, bad = sorted(failed, key=lambda trial: trial["adapter.r"])
    assert good["error"] == "" and good["large_loss"] > 0
    assert "memory" in bad["error"] and "large_loss" not in bad


def test_mlflow_has_them_all_with_their_tags(failed, cluster):
    runs = [run for run in cluster.runs() if run.data.tags["stage"] == "trial"]
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]
    for run in runs:
        assert (run.info.status == "FAILED") == ("error" in run.data.tags)
        assert {"sweep", "variant", "key"} <= run.data.tags.keys()
        if run.info.status == "FINISHED":
            assert (cluster.root / "store" / f"sft-{run.data.tags['key'][:12]}").is_dir()
            names = {"base_loss", "base_ppl_out", "large_loss", "large_ppl_out", "held_out_loss"}
            assert names <= run.data.metrics.keys()
    for run in cluster.runs():
        assert run.data.tags["variant"] == "stru" and run.data.tags["sweep"]
    clean(cluster, 60)


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_after_a_killed_driver_the_cluster_is_free(failed, cluster, sign, status):
    with cluster.start(f"sft.lr={2 + sign}e-4,{3 + sign}e-4") as sweep:
        until(lambda: cluster.trains(sweep))
        sweep.send_signal(sign)
        assert sweep.wait(60) == status, cluster.log()
    assert "Traceback" not in cluster.log()
    clean(cluster, 90)


def test_a_store_that_disappears_ends_the_sweep_in_one_line(failed, cluster):
    store, away = cluster.root / "store", cluster.root / "away"
    with cluster.start("sft.lr=5e-4,6e-4") as sweep:
        until(lambda: cluster.trains(sweep))
        store.rename(away)
        assert sweep.wait(200) == 2, cluster.log()
    assert cluster.log().strip().splitlines()[-1].startswith("error: store: ")
    assert "Traceback" not in cluster.log()
    clean(cluster, 90)
