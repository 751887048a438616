"""SparseGPT over whole models, layer by layer."""

import pytest
import torch

import loram.layers
import loram.sparse
from loram.errors import UserError
from loram.masks import layer_masks, of_weights, unpacked
from loram.model import load, save
from loram.prune import PruneConfig, pattern
from loram.sparse import SHARED, sparsify
from tests.conftest import FAMILIES, tiny_model
from tests.sparse_models import SEMI, UNST, make, rows
from tests.test_sparsegpt import by_definition


def in_memory(family: str, config: PruneConfig):
    """The same with the whole model in memory, hooks on its layers, and one Hessian a matrix."""
    model = tiny_model(family)
    masks = {}
    for i, layer in enumerate(model.model.layers):
        seen = {name: [] for names in SHARED for name in names}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, into=seen[name]: into.append(args[0].detach().flatten(0, 1))
            )
            for name in seen
        ]
        for batch in rows(2):
            with torch.no_grad():
                given = {name: batch[name] for name in ("input_ids", "position_ids")}
                model(**given, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, inputs in seen.items():
            linear = layer.get_submodule(name)
            weight, keep = by_definition(linear.weight.detach(), torch.cat(inputs), pattern(config))
            linear.weight.data.copy_(weight)
            masks[f"model.layers.{i}.{name}"] = keep
    return model, masks


def astray(root, family: str, config: PruneConfig) -> float:
    """The share of weights that are not those of `in_memory`.

    Between two weights of almost the same saliency rounding decides, and with them over a row.
    """
    make(family, root, config)
    expected, masks = in_memory(family, config)
    found = load(root / "pruned", dtype=torch.float32)
    stored = {
        name: bits for i in range(4) for name, bits in layer_masks(root / "pruned", i).items()
    }
    assert stored.keys() == masks.keys() and len(masks) == 4 * 7
    wrong = total = 0
    for name, keep in masks.items():
        weights = (model.get_submodule(name).weight.detach() for model in (expected, found))
        same = unpacked(stored[name], keep.shape[1]) == keep
        same &= torch.isclose(*weights, rtol=1e-3, atol=1e-3)
        wrong, total = wrong + int((~same).sum()), total + same.numel()
    return wrong / total


@pytest.mark.parametrize("config", [SEMI, UNST])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family, config, tmp_path):
    assert astray(tmp_path, family, config) < 0.05


def test_errors_that_do_not_reach_the_next_layer_are_noticed(tmp_path, monkeypatch):
    full = tiny_model("llama").model.layers
    original = loram.sparse.forward

    def forward(layers, i, layer, batches, spool):
        return original(layers, i, full[i], batches, spool)

    make("llama", tmp_path)
    monkeypatch.setattr(loram.sparse, "forward", forward)
    assert astray(tmp_path / "faulty", "llama", SEMI) > 0.3


def test_another_layers_inputs_are_noticed(tmp_path, monkeypatch):
    original = loram.layers.Spool.read

    def read(self, name, number):
        earlier = self.directory / "input-0"
        return original(self, "input-0" if earlier.exists() else name, 0)

    monkeypatch.setattr(loram.layers.Spool, "read", read)
    monkeypatch.setattr(loram.layers.Spool, "drop", lambda *_: None)
    assert astray(tmp_path, "llama", SEMI) > 0.3


@pytest.mark.parametrize(
    ("config", "zeros", "group"), [(SEMI, 4, 8), (PruneConfig("semi", pattern="2:4"), 2, 4)]
)
def test_exactly_n_of_every_m_by_the_stored_mask(config, zeros, group, tmp_path):
    make("qwen2", tmp_path, config)
    model = load(tmp_path / "pruned", dtype=torch.float32)
    masks = of_weights(model, tmp_path / "pruned")
    assert len(masks) == 4 * 7
    for weight, mask in masks.items():
        assert ((~mask).unflatten(1, (-1, group)).sum(-1) == zeros).all()
        assert torch.equal(weight == 0, ~mask)


def test_a_crash_half_way_goes_on_at_the_layer(tmp_path, monkeypatch):
    make("llama", tmp_path)
    done, original = [], loram.sparse.write_part

    def write_part(out, part, tensors):
        if part == "model.layers.2" and "model.layers.1" in done:
            done.append("crash")
            raise OSError(28, "No space left on device")
        done.append(part)
        original(out, part, tensors)

    monkeypatch.setattr(loram.sparse, "write_part", write_part)
    again = {"work": tmp_path / "work"}
    with pytest.raises(OSError, match="No space"):
        sparsify(tmp_path / "base", tmp_path / "again", rows(2), SEMI, **again)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(loram.sparse, "write_part", lambda *a: done.append(a[1]) or original(*a))
    sparsify(tmp_path / "base", tmp_path / "again", rows(2), SEMI, **again)
    assert done[done.index("crash") + 1 :][:2] == ["model.layers.2", "model.layers.3"]
    for file in (tmp_path / "pruned").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_weights_in_float32_are_copied_too(tmp_path):
    """Or what one layer's pruning writes would be what the next reading gets, and stay."""
    save(tiny_model("llama"), tmp_path)
    layers = loram.layers.Layers(tmp_path)
    layers.layer(1).mlp.up_proj.weight.zero_()
    assert layers.layer(1).mlp.up_proj.weight.all()


def test_bad_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="5:7, which does not divide the 64 inputs of model.layers"):
        make("llama", tmp_path, PruneConfig("semi", pattern="5:7"))
    with pytest.raises(ValueError, match="no token to predict"):
        sparsify(tmp_path / "base", tmp_path / "out", [], SEMI)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    save(model, tmp_path / "bad")
    with pytest.raises(ValueError, match="NaN or Inf in model.layers.1.mlp.up_proj.weight"):
        sparsify(tmp_path / "bad", tmp_path / "out", rows(2), SEMI)
    silent = [b | {"labels": torch.full_like(b["labels"], -100)} for b in rows(2)]
    with pytest.raises(ValueError, match="no token to predict"):
        sparsify(tmp_path / "base", tmp_path / "out", silent, SEMI)
    overflow = float("inf")
    monkeypatch.setattr(loram.sparse.Hessian, "add", lambda self, _: self.matrix.fill_(overflow))
    with pytest.raises(ValueError, match="second moments .* of model.layers.0.self_attn.q_proj"):
        sparsify(tmp_path / "base", tmp_path / "out", rows(2), SEMI)
    assert not (tmp_path / "out").exists()
