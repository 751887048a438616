"""LoRA on a compressed model, plain and under the mask: trained, recovered, merged."""

import json
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from loram.adapter import (
    AdapterConfig,
    attach,
    open_adapted,
    recover,
    restrict_,
    save_adapter,
)
from loram.errors import UserError
from loram.layers import Layers
from loram.masks import layer_file, layer_masks, unpacked
from loram.merge import adapt_layer_, merge
from loram.model import load
from loram.sparse import compress
from loram.train import TrainConfig, train
from tests.conftest import FAMILIES
from tests.sparse_models import logits, make, rows


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_recovered_and_merged(family, masked, tmp_path):
    """On the compressed model; then the same update on the untouched base, through files."""
    make(family, tmp_path)
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4=False)
    lora = AdapterConfig(r=4, alpha=8, dropout=0.0, masked=masked)
    model = attach(load(tmp_path / "compressed"), lora, seed=1)
    list(train(model, rows(3) * 2, TrainConfig(2, 1e-2, 8)))
    save_adapter(model, tmp_path / "adapter")
    pruned, base = tmp_path / "pruned", tmp_path / "base"
    recover(tmp_path / "adapter", pruned, base, tmp_path / "recovered")
    opened = open_adapted(base, tmp_path / "recovered", dtype=torch.float32)
    merge(base, tmp_path / "recovered", tmp_path / "merged")
    full, merged = load(base, dtype=torch.float32), load(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - logits(opened)).abs().max() < 1e-4
    assert (logits(merged) - logits(full)).abs().max() > 1e-3
    moved = Layers(base, adapt=partial(adapt_layer_, tmp_path / "recovered"))
    batch = rows(3)[0]
    hidden = next(moved.embedded([batch]))
    for i in range(4):
        given = moved.arguments(i, hidden, batch)
        after = [each.layer(i)(hidden, **given) for each in (moved, Layers(tmp_path / "merged"))]
        assert torch.allclose(*after, atol=1e-5) and not torch.allclose(
            after[0], Layers(base).layer(i)(hidden, **given), atol=1e-3
        )
    trained = open_adapted(tmp_path / "compressed", tmp_path / "adapter")
    assert torch.equal(logits(trained), logits(model.eval()))
    masks = {name: bits for i in range(4) for name, bits in layer_masks(pruned, i).items()}
    outside = 0.0
    for name, bits in masks.items():
        before, after = (m.get_submodule(name).weight.detach() for m in (full, merged))
        gone = ~unpacked(bits, before.shape[1])
        outside = max(outside, float((after - before)[gone].abs().max()))
    with pytest.raises(UserError, match="bound: found .* of which single weights were pruned"):
        restrict_(model, pruned)
    if masked:
        assert outside == 0
        other = layer_masks(pruned, 1)
        first = next(iter(other))
        save_file(other | {first: 255 - other[first]}, layer_file(tmp_path / "adapter", 1))
        with pytest.raises(UserError, match="with other masks"):
            open_adapted(tmp_path / "compressed", tmp_path / "adapter")
        with pytest.raises((ValueError, KeyError), match="LORAM_MASKED"):
            PeftModel.from_pretrained(full, tmp_path / "recovered")
    else:
        assert outside > 0
        stock = PeftModel.from_pretrained(full, tmp_path / "recovered")
        assert torch.equal(logits(stock), logits(opened))
        assert (
            json.loads((tmp_path / "recovered" / "adapter_config.json").read_text())["peft_type"]
            == "LORA"
        )


def test_a_mask_is_missed_by_name_outside_of_the_layers(tmp_path):
    make("llama", tmp_path)
    lora = AdapterConfig(targets=("q_proj", "lm_head"), masked=True)
    with pytest.raises(UserError, match="without a mask for lm_head"):
        attach(load(tmp_path / "pruned"), lora)
