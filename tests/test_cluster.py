"""A driver that joins a cluster: whose code its tasks run, and what every node has to see."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import head

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of a driver that joins it."""
    root, short = tmp_path_factory.mktemp("cluster"), Path("/tmp") / f"lc{os.getpid()}"
    with head(root, short, RAY_AUTH_MODE="disabled") as (address, _, env):
        yield env | {"RAY_ADDRESS": address}


ASK = """
import ray
from pipelines.cluster import start_ray
start_ray()
def where():
    from pipelines import lock
    return getattr(lock, "MARK", "")
print(ray.get(ray.remote(num_cpus=0)(where).remote()))
"""


def test_tasks_run_the_code_of_the_driver(cluster, tmp_path):
    """Not that which is installed on the nodes."""
    for name in ("loram", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "tune").mkdir()
    with (tmp_path / "pipelines" / "lock.py").open("a") as file:
        file.write('\nMARK = "of the driver"\n')
    env = cluster | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=env, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "of the driver"


SEEN = """
import sys
from pathlib import Path
from loram.errors import UserError
from pipelines import cluster
from pipelines.recipes import resolve
cluster.start_ray()
store = Path(sys.argv[1])
cluster.check_shared(resolve("test", []), store)
cluster._absent = lambda paths: [path for path in paths if path.startswith(str(store))]
try:
    cluster.check_shared(resolve("test", []), store)
except UserError as error:
    print(error)
print(list(store.iterdir()))
"""


def test_a_node_that_does_not_see_the_store(cluster, tmp_path):
    """One node is all nodes here: that it does not is made up."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(tmp_path)],
        env=cluster,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, left = done.stdout.splitlines()[-2:]
    assert refused.startswith(f"store: found {tmp_path}, which node ")
    assert refused.endswith(" does not see; accepted: what all nodes share")
    assert left == "[]"
