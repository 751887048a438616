"""Estimated peaks of what is done a layer at a time, against what torch's profiler sees."""

from pathlib import Path

import pytest
import torch

from loram.adapter import AdapterConfig, attach, recover, save_adapter
from loram.compensate import CompensateConfig, compensate
from loram.distil import DistilConfig, write_targets
from loram.layer_memory import compensate_bytes, offsets_bytes, prune_bytes, targets_bytes
from loram.model import load, read_config, save
from loram.offsets import write_offsets
from loram.prune import PruneConfig
from loram.sparse import sparsify
from loram.taylor import taylor_scores
from tests.counted import MODELS, T, batch, make_models, seen


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def mapped(model: Path) -> int:
    """Bytes of a model's files, which count as allocated although their pages are the files'."""
    return sum(file.stat().st_size for file in model.glob("model*.safetensors"))


@pytest.mark.parametrize("method", ["stru", "semi"])
@pytest.mark.parametrize("family", MODELS)
def test_pruning(method, family, models, tmp_path):
    source = models / family / "full"
    rows = [batch(4, 2048)] * 2
    config = PruneConfig(method)
    if method == "stru":
        found = seen(lambda: taylor_scores(source, rows, dtype=torch.bfloat16))
    else:
        found = seen(lambda: sparsify(source, tmp_path / "out", rows, config))
    found -= mapped(source)
    assert prune_bytes(read_config(source), config, 4, T) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_compensation(family, gradients, models, tmp_path):
    """In as little memory after many sub-blocks as after one."""
    source, pruned = models / family / "full", models / family / "stru"
    config, layers = read_config(source), range(1, read_config(source).num_hidden_layers + 1)
    options = {"offsets": layers, "dtype": torch.bfloat16, "work": tmp_path / "work"}
    fitted = [batch(4, 2048)] * 4, CompensateConfig(8, gradients=gradients)
    found = seen(lambda: compensate(source, pruned, tmp_path / "out", *fitted, **options))
    found -= mapped(source) + mapped(pruned)
    assert compensate_bytes(config, 4, T, gradients) == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize("family", MODELS)
def test_targets(family, models, tmp_path):
    source, rows = models / family / "full", [batch(4, 2048)] * 2
    options = {"work": tmp_path / "work", "dtype": torch.bfloat16}
    kept = DistilConfig(top=8)
    found = seen(lambda: write_targets(source, tmp_path / "out", rows, kept, **options))
    found -= mapped(source)
    assert targets_bytes(read_config(source), 4, T, 8) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "kind",
    [
        "stru",
        "stru nf4",
        "stru adapted",
        "compressed",
        "compressed_nf4",
        "compressed_nf4 adapted masked",
    ],
)
def test_offsets(kind, family, rows, models, tmp_path):
    """The large model's part, or the small one's, whichever is more."""
    stored, *how = kind.split()
    source, small = models / family / "full", models / family / stored
    if "nf4" in how:
        save(load(small, nf4=True), tmp_path / "nf4")
        small = tmp_path / "nf4"
    adapter, adapters = None, None
    if "adapted" in how:
        adapter = AdapterConfig(r=64, masked="masked" in how)
        adapters = tmp_path / "small", tmp_path / "large"
        save_adapter(attach(load(small), adapter), adapters[0])
        recover(adapters[0], small, source, adapters[1])
    out, given = tmp_path / "out", [batch(rows, 2048)] * 2
    options = {"work": tmp_path / "work", "dtype": torch.bfloat16, "adapters": adapters}
    found = seen(lambda: write_offsets(source, small, out, given, 10, **options))  # after the last
    found -= mapped(source)
    asked = read_config(source), read_config(small), adapter, "nf4" in kind, rows, T
    assert offsets_bytes(*asked) == pytest.approx(found, rel=0.2)
