"""Offsets that are found once more part of the way through SFT, with the adapter as it is."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loram.adapter import AdapterConfig, attach, open_adapted, recover, save_adapter
from loram.errors import UserError
from loram.layers import Layers
from loram.loss import CausalLoss
from loram.merge import adapt_layer_
from loram.model import load, save
from loram.offsets import OffsetLoss, Offsets
from loram.packing import batches, order
from pipelines import imitate
from pipelines.fit import STATE
from pipelines.imitate import OffsetsConfig
from pipelines.place import Place
from pipelines.worker import RUN
from tests.conftest import FAMILIES, tiny_model
from tests.offsetting import ADAPTER, distance, small_and_large, state, values, written
from tests.rows import packed_rows
from tests.test_distil import numbered


@pytest.mark.parametrize("family", FAMILIES)
def test_found_anew_they_know_the_adapter_on_both_models(family, tmp_path):
    base, small = small_and_large(family, tmp_path)
    adapted = attach(load(small, dtype=torch.float32), ADAPTER)
    generator = torch.Generator().manual_seed(4)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    adapters = tmp_path / "adapter", tmp_path / "recovered"
    save_adapter(adapted, adapters[0])
    recover(adapters[0], small, base, adapters[1])
    before, _ = written(tmp_path, base, small, 1)
    shutil.rmtree(tmp_path / "w")
    anew, _ = written(tmp_path, base, small, 2, adapters=adapters)
    large = CausalLoss(open_adapted(base, adapters[1], dtype=torch.float32))
    batch = numbered()[0]
    wanted = state(large, batch)
    untrained = state(CausalLoss(load(base, dtype=torch.float32)), batch)
    assert distance(untrained, wanted) > 0.3 * float(wanted.norm())  # it does move it
    there = state(OffsetLoss(adapted, anew.layers), batch | anew.fetch(batch["row"]))
    adapted = open_adapted(small, adapters[0], dtype=torch.float32)
    stale = state(OffsetLoss(adapted, before.layers), batch | before.fetch(batch["row"]))
    assert distance(there, wanted) < 0.1 * distance(stale, wanted)


def test_an_update_is_not_lost_in_what_16_bits_round_off_of_the_weights(tmp_path):
    """What an adapter has learnt after a few steps is less than that."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save(tiny_model("llama").to(torch.bfloat16), base)
    adapted = attach(load(base), AdapterConfig(r=1, dropout=0.0))
    linear = adapted.base_model.model.model.layers[1].mlp.up_proj
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    b.data = torch.full_like(b, 5e-5)
    save_adapter(adapted, adapter)
    plain = Layers(base).layer(1)
    moved = Layers(base, adapt=partial(adapt_layer_, adapter)).layer(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(64, 1) @ a  # what the adapter sees
        wanted, before = linear(x), plain.mlp.up_proj(x)
        assert distance(moved.mlp.up_proj(x), wanted) < 0.1 * distance(before, wanted)
        merged = plain.mlp.up_proj.weight + linear.get_delta_weight("default")
        assert distance(F.linear(x, merged), wanted) > 0.7 * distance(before, wanted)


def test_an_adapter_with_several_scales_is_refused(tmp_path):
    adapter = tmp_path / "adapter"
    model = tiny_model("llama")
    save(model, tmp_path / "base")
    save_adapter(attach(model, ADAPTER), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"q_proj": 3}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="alpha_pattern"):
        Layers(tmp_path / "base", adapt=partial(adapt_layer_, adapter)).layer(1)


def test_the_step_takes_the_adapter_as_it_was_at_the_end_of_the_part_before(tmp_path, monkeypatch):
    """Not the part's best; and the rows that come next in the order of training."""
    base, small = small_and_large("llama", tmp_path)
    packed = packed_rows(tmp_path / "instruct" / "train")
    packed_rows(tmp_path / "instruct" / "held_out", documents=15)
    earlier = tmp_path / "earlier"
    adapted = attach(load(small, dtype=torch.float32), ADAPTER)
    for place in (earlier, *(earlier / STATE / RUN / f"step-{n:06d}" / "adapter" for n in (2, 10))):
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.data += 0.02
        save_adapter(adapted, place)
    config = OffsetsConfig(every=2, rows=12, seed=5, first=4, end=12)
    paths = {"model": base, "small": small, "instruct": tmp_path / "instruct", "earlier": earlier}
    paths |= {"pruned": small, "out": tmp_path / "out", "work": tmp_path / "work"}
    found = imitate.offsets(config, place=Place(), **paths)
    rows = np.unique(order(packed.rows, 12, 5)[4:12])
    info = json.loads((tmp_path / "out" / "train" / "rows.json").read_text())
    assert info["rows"] == rows.tolist() and found["bytes"] > 0
    adapters = earlier / STATE / RUN / "step-000010" / "adapter", tmp_path / "recovered"
    recover(adapters[0], small, base, adapters[1])
    given = list(batches(packed, rows, 4))
    options = {"adapters": adapters, "dtype": torch.bfloat16}
    wanted, _ = written(tmp_path, base, small, 2, given, **options)
    one = torch.tensor(rows[:1])
    assert torch.equal(values(Offsets(tmp_path / "out" / "train"), one), values(wanted, one))
    # An attempt after a lost worker has what was finished.
    monkeypatch.setattr(imitate, "write_offsets", None)
    again = imitate.offsets(config, place=Place(), **paths | {"out": tmp_path / "again"})
    assert again["bytes"] == found["bytes"] and again["tokens"] == found["tokens"]
