"""cluster.yaml as Ray would carry it out: valid, closed to strangers, in the pinned versions."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def written() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def config(written) -> dict:
    """With Ray's own defaults filled in, some of which are insecure: what a node would run."""
    return prepare_config(json.loads(json.dumps(written)))


def ray_start(commands: list[str]) -> dict:
    """The options of the one `ray start` among the commands, parsed by Ray's own command line."""
    (command,) = [c for c in commands if "ray start" in c]
    arguments = shlex.split(command.split("ray start", 1)[1])
    return start.make_context("start", arguments, resilient_parsing=True).params


def test_the_file_satisfies_the_schema_in_the_wheel(written, config):
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(written, json.loads(schema.read_text()))
    validate_config(config)


def test_a_misspelt_key_would_be_refused(written):
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(written | {"file_mount": {}}))


def test_the_dashboard_listens_on_loopback(config):
    head = ray_start(config["head_start_ray_commands"])
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    worker = ray_start(config["worker_start_ray_commands"])
    assert not worker["head"] and worker["address"] == "$RAY_HEAD_IP:6379"


def test_every_node_asks_for_the_token_and_has_it(config):
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in json.dumps(config), "the secret itself has no place in this file"


def test_versions_are_the_pinned_ones(config):
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert ray.__version__ == pins["ray"]
    for image in ("head_image", "worker_image"):
        assert config["docker"][image].startswith(f"rayproject/ray:{pins['ray']}-py311-")
    installs = config["head_setup_commands"] + config["worker_setup_commands"]
    assert all(c.startswith("pip install -c ~/loram/constraints.txt ") for c in installs)
    assert config["file_mounts"]["~/loram"] == "."
    assert "nightly" not in json.dumps(config)


def test_gpu_nodes_come_only_when_wanted_and_share_the_store(config):
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["a100"]
    assert "GPU" not in head["resources"] and head["max_workers"] == 0
    assert worker["resources"]["GPU"] == 8 and worker["min_workers"] == 0 < worker["max_workers"]
    assert worker["node_config"]["InstanceType"] == "p4de.24xlarge"
    assert "--volume /shared:/shared" in config["docker"]["run_options"]
    assert "--env LORAM_HOME=/shared/loram" in config["docker"]["run_options"]
    assert any("/shared" in c and "mount -t" in c for c in config["initialization_commands"])
