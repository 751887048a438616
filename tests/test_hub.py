"""Models of the hub: by commit, gated, out of reach; against a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipelines.assets import TINY, home
from tests.hub import serving

ROOT = Path(__file__).parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def someone(tmp_path):
    """Where the hub keeps `someone/tiny`: two commits, of which the newer has another norm."""
    from safetensors.torch import load_file, save_file

    place = tmp_path / "hub" / "models" / "someone" / "tiny"
    for commit in (OLD, NEW):
        shutil.copytree(home() / "assets" / TINY, place / commit)
    weights = load_file(place / NEW / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 2.0)
    save_file(weights, place / NEW / "model.safetensors", metadata={"format": "pt"})
    return place


def python(code: str, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    """In a process of its own: the address of the hub is read when its client is imported."""
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | variables | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


LOOK = """
import json, sys, torch
from pathlib import Path
from loram.data import load_tokenizer
from loram.model import load, read_config
from loram.shards import Checkpoint
from pipelines.locate import locate_model
found = []
for path in sys.argv[1:]:
    assert read_config(path).num_hidden_layers == 4  # as every check does
    source = locate_model(path, Path("unused"))
    norm = load(source.uri).model.norm.weight.float().mean().item()
    assert Checkpoint(source.uri).read("model.norm.weight").float().mean().item() == norm
    assert len(load_tokenizer(source.uri)) and read_config(source.uri).hidden_size == 64
    found.append([source.uri, source.digest, norm])
print(json.dumps(found))
"""


def test_a_model_of_the_hub_is_the_one_of_its_commit(someone):
    with serving(someone.parents[2]) as variables:
        done = python(LOOK, variables, "someone/tiny", f"someone/tiny@{OLD}", f"someone/tiny@{NEW}")
    assert done.returncode == 0, done.stderr[-3000:]
    newest, old, new = json.loads(done.stdout.splitlines()[-1])
    assert newest == new == [f"someone/tiny@{NEW}", NEW, 2.0]
    assert old[:2] == [f"someone/tiny@{OLD}", OLD] and old[2] != 2.0
    # The same without the hub, of what the cache has.
    done = python(LOOK, variables | OFFLINE, "someone/tiny", f"someone/tiny@{OLD}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [newest, old]


CHECK = """
import sys
from loram.errors import UserError
from loram.model import read_config
from pipelines.check import check_model
for model in sys.argv[1:]:
    try:
        read_config(model)
        check_model(model)
        print("accepted")
    except UserError as error:
        print(error)
"""


def test_what_the_hub_cannot_give_is_refused_before_a_download(someone, tmp_path):
    def said(*models: str, **more: str) -> list[str]:
        done = python(CHECK, variables | more, *models)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-len(models) :]

    with serving(someone.parents[2]) as variables:
        there, revision, absent = said("someone/tiny@main", "someone/tiny@v2", "someone/else")
        assert there == "accepted"
        assert revision.startswith("model: found someone/tiny without revision 'v2';")
        assert absent.startswith("model: found someone/else, neither a directory nor a hub id")
        half, absent = said("someone/tiny", "someone/else", **OFFLINE)  # the config is in the cache
        assert half.startswith("model: found /") and "without model.safetensors;" in half
        assert absent.startswith("model: found someone/else, which the cache has not")
        assert "a hub id within reach" in said("someone/tiny", HF_ENDPOINT="http://127.0.0.1:9")[0]
        config = someone / NEW / "config.json"
        whole = config.read_text()
        config.write_text("{")
        broken = said("someone/tiny", HF_HOME=str(tmp_path / "broken"))[0]
        assert "config.json that is not JSON" in broken
        config.write_text(whole)
        (someone / "branch").mkdir()
        shutil.copy(config, someone / "branch")
        assert "without model.safetensors" in said("someone/tiny@branch")[0]  # now in the cache
        shutil.rmtree(someone / "branch")
        assert "without revision 'branch'" in said("someone/tiny@branch")[0]
        (someone / "gated").touch()
        fresh = {"HF_HOME": str(tmp_path / "fresh")}
        gated = said("someone/tiny", **fresh)[0]
        assert (
            gated.startswith("model: found someone/tiny, which is gated;") and "HF_TOKEN" in gated
        )
        fresh["HF_TOKEN"] = "hf_anything"
        (someone / OLD / "model.safetensors").rename(someone / OLD / "pytorch_model.bin")
        there, bare = said("someone/tiny", f"someone/tiny@{OLD}", **fresh)
        assert there == "accepted"
        assert bare.startswith(f"model: found someone/tiny@{OLD} without model.safetensors;")


RECOVER = """
import json, sys
from pathlib import Path
from peft import AutoPeftModelForCausalLM
import loram
from loram.adapter import AdapterConfig, attach, recover, save_adapter
from loram.prune import PruneConfig, choose, prune, random_scores
base, work = sys.argv[1], Path(sys.argv[2])
full, config = loram.read_config(base), PruneConfig("rand", 0.5, keep_first=1, keep_last=1)
prune(base, work / "pruned", choose(random_scores(full, 0), full, config))
save_adapter(attach(loram.load(work / "pruned"), AdapterConfig()), work / "adapter")
recover(work / "adapter", work / "pruned", base, work / "recovered")
model = AutoPeftModelForCausalLM.from_pretrained(work / "recovered")
print(json.dumps(model.base_model.model.model.norm.weight.float().mean().item()))
"""


def test_a_recovered_adapter_names_the_commit_of_its_base(someone, tmp_path):
    """By which PEFT opens the model that it is for, also when the hub has a newer one."""
    with serving(someone.parents[2]) as variables:
        done = python(RECOVER, variables, f"someone/tiny@{OLD}", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) != 2.0
    config = json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/tiny", OLD)
