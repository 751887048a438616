"""Files that pruning writes and reads: what a crash, a file system or an old checkpoint leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loram.compensate import CompensateConfig, compensate
from loram.errors import UserError
from loram.layers import Spool
from loram.model import load, save
from loram.prune import PruneConfig, choose, prune, score
from loram.shards import Checkpoint, link, rewrite
from loram.sparse import sparsify
from tests.conftest import tiny_model
from tests.sparse_models import SEMI, logits, make, rows

STRU = PruneConfig("stru", 0.5, keep_first=1, keep_last=1)


def test_rotary_frequencies_in_a_checkpoint_are_no_weights(tmp_path):
    """LLaMA-2's has them in every layer; what transformers ignores, pruning ignores."""
    model = tiny_model("llama")
    save(model, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    scores = score(tmp_path / "base", rows(1), STRU)
    prune(tmp_path / "base", tmp_path / "cut", choose(scores, model.config, STRU))
    fitted = tmp_path / "base", tmp_path / "cut", tmp_path / "small"
    compensate(*fitted, rows(1), CompensateConfig(rank=4))
    sparsify(tmp_path / "base", tmp_path / "sparse", rows(1), SEMI)
    for made in ("cut", "small", "sparse"):
        assert not any("inv_freq" in name for name in Checkpoint(tmp_path / made).names())
        assert logits(load(tmp_path / made)).isfinite().all()


def test_the_files_of_a_checkpoint_are_those_of_its_index(tmp_path):
    """Whatever they are called, and whatever else lies there."""
    model = tiny_model("llama")
    save(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "model-other.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "weights.safetensors")}))
    assert set(Checkpoint(tmp_path).names()) == set(weights)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="without weights.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("method", ["rand", "semi"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(method, name, tmp_path):
    """Also by random pruning, which looks at no value, and outside of the layers."""
    model = tiny_model("llama")
    model.get_parameter(name).data.view(-1)[5] = float("nan")
    save(model, tmp_path / "base")
    with pytest.raises(ValueError, match=f"NaN or Inf in {name}"):
        if method == "semi":
            sparsify(tmp_path / "base", tmp_path / "out", rows(1), SEMI)
        else:
            scores = score(tmp_path / "base", [], PruneConfig("rand"))
            kept = choose(scores, model.config, STRU)
            prune(tmp_path / "base", tmp_path / "out", kept)


def test_a_crash_while_deleting_leaves_nothing_half(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "activations")
    spool.write("input-3", (torch.ones(2) for _ in range(3)))

    def rmtree(path, **options):
        """Deletes one file and dies."""
        if path.exists():
            next(file for file in path.rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("loram.layers.shutil.rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            spool.drop("input-3")
    assert spool.names() == set()
    spool.write("input-4", [torch.ones(2)])
    with monkeypatch.context() as patched:
        patched.setattr("loram.layers.shutil.rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            spool.clear()
    assert spool.names() == set()
    spool.write("input-3", [torch.zeros(1)])
    spool.drop("input-3")
    spool.drop("input-3")
    assert not list(spool.directory.iterdir())
    spool.clear()
    assert not list(tmp_path.iterdir())


def test_a_crash_while_rewriting_leaves_the_old_text(tmp_path, monkeypatch):
    file, original = tmp_path / "report.json", Path.write_text
    rewrite(file, json.dumps({"layer": 1}))

    def write_text(self, text):
        original(self, text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="No space"):
        rewrite(file, json.dumps({"layer": 2}))
    assert json.loads(file.read_text()) == {"layer": 1}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    """Some shared ones have none; and what an earlier attempt left is replaced."""
    make("llama", tmp_path)

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "masks-00001.safetensors").write_text("half")
    sparsify(tmp_path / "base", tmp_path / "again", rows(2), SEMI)
    for file in (tmp_path / "pruned").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_linked_or_copied_it_is_the_same_file(tmp_path):
    (tmp_path / "a").write_text("1")
    link(tmp_path / "a", tmp_path / "b")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
