"""Steps as Ray tasks: the threads that they have, and the end of one that takes too much memory."""

import os
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from loram.errors import UserError
from pipelines.cluster import check_room, start_ray
from pipelines.execute import _explain
from pipelines.launch import _bare, ray_launch
from pipelines.place import Place
from pipelines.step import Step
from pipelines.steps import Empty

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def away(monkeypatch):
    """A Ray of its own, once the test has started it, that need not find this file."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def threads(config: Empty, *, out, work, place):
    return {"threads": torch.get_num_threads(), "process": os.getpid()}


def made(name: str, root: Path, cpus: int) -> dict:
    step, out = Step(name, threads, Empty(), cpus=cpus), root / name
    out.mkdir()
    return ray_launch(step, {}, out, root / "work", None).result(200)


def test_a_step_has_as_many_threads_as_cpus_in_a_process_that_had_fewer(away, tmp_path):
    start_ray()
    cpus = os.cpu_count()
    light, heavy = made("light", tmp_path, 0), made("heavy", tmp_path, cpus)
    assert light["process"] == heavy["process"]
    assert heavy["threads"] == cpus


def test_what_ray_will_never_have_is_refused_or_of_a_cluster_said(away, monkeypatch):
    start_ray()
    cpus = os.cpu_count()
    said: list[str] = []
    check_room(Place(cpus_per_worker=cpus), said.append)
    more = Place(workers=2, cpus_per_worker=cpus)
    with pytest.raises(UserError, match=f"2 workers of {cpus} CPUs .* 1 x {cpus} CPUs and 0 GPUs"):
        check_room(more, said.append)
    assert not said
    monkeypatch.setenv("RAY_ADDRESS", "a cluster's, which may grow")
    check_room(more, said.append)
    assert said[0].startswith(f"waiting for room: 2 workers of {cpus} CPUs and 0 GPUs")


def test_a_worker_has_its_cpus_and_gpus_on_one_node():
    head, small = {"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}
    place = Place(workers=2, cpus_per_worker=4, gpus_per_worker=1)
    assert [place.fits([head, *[small] * n]) for n in (0, 1, 2, 5)] == [0, 0, 1, 2]
    assert Place(workers=3, cpus_per_worker=8).fits([{"CPU": 12.0}] * 2) == 0


def test_of_a_failed_training_is_told_what_its_worker_raised():
    raised = UserExceptionWithTraceback(ValueError("no such row"), "Traceback ...")
    wrapped = WorkerGroupError("[Rank 0 Error Snippet]:\nTraceback ...", {0: raised})
    step = Step("sft", sleep, Empty())
    said = str(_explain(step, _bare(wrapped), Path("store")))
    assert said == "step sft: ValueError: no such row"


def sleep(config: Empty, *, out, work, place):
    time.sleep(300)
    return {}


def test_a_step_that_ray_kills_for_its_memory_fails_and_is_not_started_for_ever(
    away, tmp_path, monkeypatch
):
    """Ray's own memory monitor, with a limit that every process is above."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    start_ray()
    future = ray_launch(Step("sleep", sleep, Empty()), {}, tmp_path, tmp_path, None)
    with pytest.raises(ray.exceptions.OutOfMemoryError):
        future.result(200)
