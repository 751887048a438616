"""Correction of a recovered adapter for weights that alignment, SparseGPT or NF4 changed."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import loram.correct
from loram.adapter import AdapterConfig, attach, recover, save_adapter
from loram.correct import Changes, corrected
from loram.errors import UserError
from loram.kept import Kept
from loram.masks import layer_masks, unpacked
from loram.model import load, read_config, save
from loram.prune import PruneConfig, choose, copy_companions, prune
from loram.sparse import pack, sparsify
from loram.taylor import random_scores
from tests.conftest import FAMILIES, tiny_model
from tests.test_sparse import rows

CUT = PruneConfig("rand", 0.5, keep_first=1, keep_last=1, seed=3)
ADAPTER = AdapterConfig(r=4, alpha=8, dropout=0.0)
WEIGHTS = "adapter_model.safetensors"


def make(root, family: str, change: str) -> None:
    """root/base, root/pruned, root/small (the pruned one changed in one way) and root/adapter."""
    full = tiny_model(family)
    save(full, root / "base")
    if change in ("nothing", "aligned", "nf4"):
        kept = choose(random_scores(full.config, 3), full.config, CUT)
        prune(root / "base", root / "pruned", kept)
        small = load(root / "pruned", dtype=torch.float32, nf4=change == "nf4")
        if change == "aligned":
            generator = torch.Generator().manual_seed(8)
            for layer in small.model.layers:
                for weight in layer.parameters():
                    weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        save(small, root / "small")
        copy_companions(root / "pruned", root / "small")
    else:
        sparsify(root / "base", root / "pruned", rows(2), PruneConfig("unst"))
        packed = root / ("packed" if change == "sparse resaved" else "small")
        pack(root / "pruned", packed, nf4=change == "sparse nf4")
        if change == "sparse resaved":  # then nothing but its tensors tells the masks
            save(load(packed), root / "small")
    model = attach(load(root / "small", dtype=torch.float32), ADAPTER, seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    save_adapter(model, root / "adapter")


def recovered(root, correct: bool, out: str) -> dict[str, torch.Tensor]:
    small = root / "small" if correct else None
    recover(root / "adapter", root / "pruned", root / "base", root / out, small)
    return load_file(root / out / WEIGHTS)


CHANGES = ("nothing", "aligned", "nf4", "sparse", "sparse nf4", "sparse resaved")


@pytest.mark.parametrize("change", CHANGES)
def test_in_the_span_of_the_adapter_training_is_reproduced(change, tmp_path, monkeypatch):
    """Every matrix, without the limit: on the kept part, x W_full + s x A' B' is what the small
    model computed for the same x; the changes are read as the model in memory has them."""
    monkeypatch.setattr(loram.correct, "LIMIT", float("inf"))
    make(tmp_path, "qwen2", change)
    plain, fixed = (recovered(tmp_path, correct, str(correct)) for correct in (False, True))
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in fixed.items()}
    if change == "nothing":
        assert all(torch.equal(plain[name], fixed[name]) for name in plain)
        return
    full, small = load(tmp_path / "base", dtype=torch.float32), load(tmp_path / "small")
    trained = load_file(tmp_path / "adapter" / WEIGHTS)
    slices = Kept.load(tmp_path / "pruned").slices(full.config)
    masks = {n: m for i in range(4) for n, m in layer_masks(tmp_path / "pruned", i).items()}
    seen = 0
    for name, linear in linears(full):
        weight, there = linear.weight.detach(), dense(small.get_submodule(name))
        a, b = (fixed[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        old_a, old_b = (trained[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        if name in slices:
            cut = slices[name]
            weight = cut.take(weight)
            a, b = (a, cut.take(b)) if cut.dim == 0 else (cut.take(a), b)
        if name in masks:
            weight = weight * unpacked(masks[name], weight.shape[1])
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)) @ old_a
        expected = x @ there.T + 2 * x @ old_a.T @ old_b.T
        got = x @ weight.T + 2 * x @ a.T @ b.T
        assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
        seen += 1
    assert seen == 4 * 7


def linears(model):
    """The decoder's linears, in the order of their names in the model."""
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            yield name, module


def dense(module) -> torch.Tensor:
    if type(module).__name__ == "Linear4bit":
        return bnb.dequantize_4bit(module.weight, module.weight.quant_state).float()
    return module.weight.detach().float()


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_stay_and_stock_peft_opens_it(family, tmp_path):
    make(tmp_path, family, "nf4")
    plain, fixed = (recovered(tmp_path, correct, str(correct)) for correct in (False, True))
    assert any(not torch.allclose(plain[name], fixed[name]) for name in plain)
    config = read_config(tmp_path / "base")
    for module, cut in Kept.load(tmp_path / "pruned").slices(config).items():
        factor = fixed[f"base_model.model.{module}.lora_{'BA'[cut.dim]}.weight"]
        gone = sorted(set(range(cut.size)) - set(cut.index.tolist()))
        assert not factor.index_select(cut.dim, torch.tensor(gone)).any()
    PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "True")


def test_the_limit_and_the_scale():
    """By hand: rank 1, change along x; 1/s divides, and no more than 3 times B' is taken."""
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0], [1.0]])
    change = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    new_a, new_b = corrected(a, b, change, 2.0)
    assert torch.allclose(new_b @ new_a, torch.tensor([[1.5, 0.0], [0.5, 0.0]]))
    new_a, new_b = corrected(a, b, 100 * change, 2.0)
    # 100 C / s = (50, 150), of mean 100; B' = (2, 2): at most 6 in the mean.
    assert torch.allclose(new_b @ new_a, torch.tensor([[2 - 3.0, 0.0], [2 - 9.0, 0.0]]))
    zero = torch.zeros(2, 1)
    assert torch.equal(corrected(a, zero, change, 2.0)[1], zero)


def test_memory_is_one_matrix(tmp_path, monkeypatch):
    make(tmp_path, "llama", "aligned")
    asked = []
    original = loram.correct.Checkpoint.read
    monkeypatch.setattr(
        loram.correct.Checkpoint,
        "read",
        lambda self, name: asked.append(name) or original(self, name),
    )
    slices = Kept.load(tmp_path / "pruned").slices(read_config(tmp_path / "base"))
    changes = Changes(tmp_path / "base", tmp_path / "small", slices)
    assert not asked
    changes.of("model.layers.2.mlp.up_proj")
    assert set(asked) == {"model.layers.2.mlp.up_proj.weight"}
    assert changes.of("lm_head") is None


def test_what_cannot_be_corrected_is_refused(tmp_path):
    make(tmp_path, "llama", "aligned")
    file = tmp_path / "adapter" / "adapter_config.json"
    plain = json.loads(file.read_text())
    for change in ({"alpha_pattern": {"q_proj": 3}}, {"peft_type": "LORAM_MASKED"}):
        file.write_text(json.dumps(plain | change))
        with pytest.raises(UserError, match="alpha_pattern|adapter.masked"):
            recovered(tmp_path, True, "out")
