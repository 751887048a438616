"""Steps as Ray tasks, and the Ray that they run in."""

import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loram.errors import UserError, refuse
from pipelines.execute import run
from pipelines.locate import all_sources
from pipelines.place import Place, forget_peak
from pipelines.recipe import Recipe
from pipelines.step import Metrics, Step

ROOT = Path(__file__).parents[1]
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in what `ray job submit` runs
# Ray's own setting is to start a task for ever that is killed for its memory.
ENV = {"RAY_task_oom_retries": "1"}
# No one takes this machine away; a watcher for that is one more process a training.
EMBEDDED = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


def start_ray() -> None:
    """Join the cluster of $RAY_ADDRESS, which a submitted job has; without one, start Ray here.

    The embedded Ray ends with this process, a killed one included. Tasks run this code, whether or
    not it, or another state of it, is installed, and wherever the program was started.

    What Ray Train runs to give back the CPUs of a training that was killed asks Ray's dashboard,
    and has to be told which Ray, for a machine may run several.

    Raises:
        UserError: no cluster is there.
    """
    os.environ |= ENV
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        told: dict[str, Any] = {"env_vars": ENV | {"RAY_ADDRESS": address}}
        if JOB not in os.environ:  # a submitted job has brought this code along
            told["py_modules"] = [str(ROOT / name) for name in ("loram", "pipelines", "tune")]
        try:
            ray.init(**quiet, runtime_env=told)
        except ConnectionError:
            refuse("RAY_ADDRESS", f"{address}, where no Ray answers", "that of a running cluster")
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}
    ray.init(
        address="local",
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        runtime_env={"env_vars": ENV | EMBEDDED | own},
        **quiet,
    )


def nodes() -> list[dict[str, float]]:
    """The resources of each living node of the running Ray."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_room(place: Place, say: Callable[[str], None]) -> None:
    """Ray waits in silence for what it has not: a cluster may grow, so of one this is said.

    Raises:
        UserError: what was started here has less than a training asks for, and will not grow.
    """
    if place.fits(nodes()):
        return
    each = f"{place.cpus_per_worker} CPUs and {place.gpus_per_worker} GPUs"
    asked = f"{place.workers} workers of {each}, each on one node"
    sizes = Counter(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes())
    there = ", ".join(f"{count} x {size}" for size, count in sizes.items())
    if not os.environ.get("RAY_ADDRESS"):
        refuse("place", asked, f"what this machine gives to Ray: {there}")
    say(f"waiting for room: {asked}; the nodes have {there}")


def check_shared(recipe: Recipe, store: Path) -> None:
    """Every node that a cluster has now sees the store, and local models and data where they are.

    Raises:
        UserError: one does not; names it and the path.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return
    probe = str(store / f".probe-{uuid.uuid4().hex}")
    named = [recipe.model, *(spec.path for spec in all_sources(recipe))]
    paths = [probe, *filter(os.path.exists, named)]
    Path(probe).touch()
    try:
        for node in filter(lambda node: node["Alive"], ray.nodes()):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(num_cpus=0)(_absent).options(scheduling_strategy=there)
            for path in ray.get(look.remote(paths)):
                setting, shown = ("store", store) if path == probe else ("file", path)
                found = f"{shown}, which node {node['NodeManagerAddress']} does not see"
                refuse(setting, found, "what all nodes share")
    finally:
        os.unlink(probe)


def _absent(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]


def ray_launch(
    step: Step, inputs: dict[str, Any], out: Path, work: Path, place: Any
) -> "Future[Metrics]":
    """Run the step as a Ray task with its cpus and gpus; cancelling the Future kills the task.

    A lost worker is replaced once, also one that Ray killed for its memory: the second attempt
    goes on from `work`. What the step raised is what the Future raises; a UserError is found below
    any of Ray's wrappings.
    """
    # Given here and not to `options`, GPUs make Ray end the worker with the task: one that waits
    # for the next would keep what torch has allocated, and its choice of a GPU.
    task = ray.remote(num_cpus=step.cpus, num_gpus=step.gpus, max_retries=1)(_alone).options(
        name=step.slug,
        # A trial of a sweep has a placement group without CPUs, in which nothing else would fit.
        scheduling_strategy="DEFAULT" if step.cpus or step.gpus else None,
    )
    ref = task.remote(step, inputs, out.absolute(), work.absolute(), place)
    future: Future[Metrics] = Future()

    def settle(answer: "Future[Metrics]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        error = answer.exception()
        if error is None:
            future.set_result(answer.result())
        else:
            future.set_exception(_bare(error))

    def stop(cancelled: "Future[Metrics]") -> None:
        if cancelled.cancelled() and ray.is_initialized():
            ray.cancel(ref, force=True)

    future.add_done_callback(stop)
    ref.future().add_done_callback(settle)
    return future


def _alone(step: Step, *rest: Any) -> Metrics:
    """Run the step in a worker that may have run others: the most memory it held is its own, and
    torch, which took its number of threads from the first of them, uses the CPUs of this one."""
    forget_peak()
    if step.cpus:
        import torch  # steps without CPUs do without

        torch.set_num_threads(int(step.cpus))
    return run(step, *rest)


def _bare(error: BaseException) -> BaseException:
    """The step's own exception: a UserError if there is one below, else what the task raised, or of
    a training what its worker did."""
    pending, seen = [error], set()
    while pending:
        inner = pending.pop()
        if isinstance(inner, UserError):
            return UserError(str(inner.args[0]))
        if id(inner) in seen:
            continue
        seen.add(id(inner))
        below = [getattr(inner, name, None) for name in ("__cause__", "cause", "_base_exc")]
        below += getattr(inner, "worker_failures", {}).values()  # of ray.train.WorkerGroupError
        below.append(getattr(inner, "controller_failure", None))  # of ray.train.ControllerError
        pending += [link for link in below if isinstance(link, BaseException)]
    return _unwrapped(error)


def _unwrapped(error: BaseException) -> BaseException:
    """What Ray and Ray Train wrapped, whose own texts are tracebacks."""
    inner = [getattr(error, name, None) for name in ("cause", "_base_exc", "controller_failure")]
    inner += getattr(error, "worker_failures", {}).values()
    found = next((link for link in inner if isinstance(link, BaseException)), None)
    return _unwrapped(found) if found else error
