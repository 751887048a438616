"""The Ray that steps run in: this machine's own, or a cluster."""

import logging
import os
import socket
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loram.errors import refuse
from pipelines.locate import all_sources
from pipelines.place import Place
from pipelines.recipe import Recipe

ROOT = Path(__file__).parents[1]
LOOK_S = 60  # for all nodes' answers to what they see; a node that hangs holds up no run
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
    """Every node that a cluster has now sees the store, and local models and data where they are;
    those that join it later are not asked.

    Raises:
        UserError: one does not; names it and the path.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return
    probe = str(store / f".probe-{uuid.uuid4().hex}")
    named = [recipe.model, *(spec.path for spec in all_sources(recipe))]
    paths = [probe, *filter(os.path.exists, named)]
    Path(probe).touch()
    looks = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0)(_absent).options(scheduling_strategy=there)
            looks[task.remote(paths)] = node["NodeManagerAddress"]
    try:
        answered, _ = ray.wait(list(looks), num_returns=len(looks), timeout=LOOK_S)
        for look in answered:
            try:
                absent = ray.get(look)
            except RayError:
                continue  # the node has left since
            for path in absent:
                setting, shown = ("store", store) if path == probe else ("file", path)
                found = f"{shown}, which node {looks[look]} does not see"
                refuse(setting, found, "what all nodes share")
    finally:
        os.unlink(probe)


def _absent(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]
