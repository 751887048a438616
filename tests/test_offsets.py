"""Offsets: the small model, put where the large one is, and what trains there."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loram.adapter import (
    AdapterConfig,
    adapt_layer_,
    attach,
    open_adapted,
    recover,
    save_adapter,
)
from loram.by_row import from_float8
from loram.layers import Layers
from loram.loss import CausalLoss
from loram.model import load, save
from loram.offsets import (
    OffsetLoss,
    Offsets,
    evenly,
    offset_bytes,
    write_offsets,
)
from loram.packing import batches, order
from loram.prune import PruneConfig, choose, prune
from loram.sparse import pack, sparsify
from loram.taylor import random_scores
from loram.train import TrainConfig, train
from pipelines import imitate
from pipelines.fit import STATE
from pipelines.imitate import OffsetsConfig
from pipelines.place import Place
from pipelines.worker import RUN
from tests.conftest import FAMILIES, tiny_model
from tests.rows import packed_rows
from tests.test_distil import numbered, stumbling
from tests.test_sparse import rows

ADAPTER = AdapterConfig(r=4, dropout=0.0)


def small_and_large(family, tmp_path, ratio=0.5):
    """Directories of a full model and of it cut at random."""
    full = tiny_model(family)
    save(full, tmp_path / "base")
    config = PruneConfig("rand", ratio, keep_first=1, keep_last=1, seed=3)
    kept = choose(random_scores(full.config, 3), full.config, config)
    prune(tmp_path / "base", tmp_path / "small", kept)
    return tmp_path / "base", tmp_path / "small"


def written(tmp_path, base, small, layers, given=None, **options):
    out = tmp_path / f"offsets-{layers}"
    out.mkdir()
    found = write_offsets(
        base, small, out, given or numbered(), layers, work=tmp_path / "w", **options
    )
    return Offsets(out), found


def state(module, batch) -> torch.Tensor:
    """What the output head sees, which decides the answer."""
    given, seen = {name: tensor for name, tensor in batch.items() if name != "row"}, []
    norm = next(m for name, m in module.named_modules() if name.endswith("model.norm"))
    hook = norm.register_forward_hook(lambda norm, args, output: seen.append(output.float()))
    with torch.no_grad():
        module(**given)
    hook.remove()
    return seen[0]


def values(offsets, rows) -> torch.Tensor:
    found = offsets.fetch(rows)
    return from_float8({name: found[f"offset_{name}"] for name in ("values", "scale")})


def distance(a, b) -> float:
    return float((a - b).norm())


def test_layers_are_spread_evenly_and_the_last_is_among_them():
    assert evenly(30, 0) == []
    assert evenly(30, 1) == [30]
    assert evenly(30, 3) == [10, 20, 30]
    assert evenly(4, 4) == evenly(4, 9) == [1, 2, 3, 4]


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_small_model_answers_as_the_large_one(family, layers, tmp_path):
    base, small = small_and_large(family, tmp_path)
    offsets, found = written(tmp_path, base, small, layers)
    positions = 8 * 48
    assert found["tokens"] == positions
    planned = offset_bytes(load(base).config, layers, positions)
    assert planned == positions * layers * (64 + 4)
    assert 0 < found["bytes"] - planned < 2 * 300
    module = OffsetLoss(attach(load(small, dtype=torch.float32), ADAPTER), offsets.layers)
    for batch in numbered():
        large = state(CausalLoss(load(base, dtype=torch.float32)), batch)
        there = state(module, batch | offsets.fetch(batch["row"]))
        assert distance(there, large) < 0.04 * distance(state(module, batch), large)


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
    before, _ = written(tmp_path, base, small, 4)
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


def test_rounding_does_not_add_up(tmp_path):
    """After each layer the stream is off by what one offset rounds off."""
    base, small = small_and_large("llama", tmp_path)
    offsets, _ = written(tmp_path, base, small, 4)
    model = load(small, dtype=torch.float32)
    module, batch, seen = OffsetLoss(model, offsets.layers), numbered()[0], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: seen.append(output))
    state(module, batch | offsets.fetch(batch["row"]))
    full = load(base, dtype=torch.float32)
    hidden = full(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False,
                  output_hidden_states=True).hidden_states  # fmt: skip
    for i in (1, 2, 3):  # the last state is after the norm
        off = (seen[i - 1] - hidden[i]).abs().amax(-1)
        largest = values(offsets, batch["row"])[:, i - 1].abs().amax(-1)
        assert (off <= 0.08 * largest + 1e-5).all()


def test_where_nothing_was_cut_they_are_zero(tmp_path):
    base, small = small_and_large("qwen3", tmp_path, ratio=0.0)
    offsets, _ = written(tmp_path, base, small, 2)
    for batch in numbered():
        assert not values(offsets, batch["row"]).any()


def test_rows_are_found_by_number(tmp_path):
    base, small = small_and_large("llama", tmp_path)
    offsets, _ = written(tmp_path, base, small, 2)
    both = values(offsets, torch.tensor([30, 100]))
    assert both.shape == (2, 2, 48, 64)
    assert torch.equal(both[1], values(offsets, torch.tensor([100]))[0])
    assert not torch.equal(both[0], both[1])
    with pytest.raises(KeyError):
        offsets.fetch(torch.tensor([31]))


@pytest.mark.parametrize("kind", ["nf4", "packed", "packed nf4"])
def test_they_make_up_for_nf4_and_for_single_weights(kind, tmp_path):
    base, small = small_and_large("llama", tmp_path)
    if kind == "nf4":
        save(load(small, nf4=True), tmp_path / "trained")
    else:
        sparsify(base, tmp_path / "sparse", rows(4), PruneConfig("semi"), work=tmp_path / "s")
        pack(tmp_path / "sparse", tmp_path / "trained", nf4="nf4" in kind)
    bf16 = {"dtype": torch.bfloat16}  # as the pipeline calls it
    offsets, _ = written(tmp_path, base, tmp_path / "trained", 2, **bf16)
    module = OffsetLoss(attach(load(tmp_path / "trained"), ADAPTER), offsets.layers)
    batch = numbered()[0]
    put_right = batch | offsets.fetch(batch["row"])
    with torch.autocast("cpu", torch.bfloat16):
        large = state(CausalLoss(load(base)), batch)
        there = state(module, put_right)
        alone = state(module, batch)
    assert distance(there, large) < 0.1 * distance(alone, large)


def test_what_trains_is_the_adapter_alone_and_checkpointing_changes_nothing(tmp_path):
    base, small = small_and_large("llama", tmp_path)
    offsets, _ = written(tmp_path, base, small, 2)
    factors = []
    for checkpointing in (False, True):
        model = load(small, dtype=torch.float32)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        adapted = attach(model, ADAPTER)
        module = OffsetLoss(adapted, offsets.layers)
        given = [batch | offsets.fetch(batch["row"]) for batch in numbered()] * 4
        config = TrainConfig(4, 1e-2, 8, warmup_steps=1)
        logs = list(train(module, given, config, dtype=torch.float32))
        assert logs[-1].loss < logs[0].loss
        after = {n.replace(".base_layer", ""): w.detach() for n, w in model.named_parameters()}
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        factors.append({name: w for name, w in after.items() if "lora_" in name})
    for name, factor in factors[0].items():
        assert torch.allclose(factor, factors[1][name], atol=1e-6)


def test_a_crash_half_way_goes_on_at_the_layer(tmp_path, monkeypatch):
    base, small = small_and_large("llama", tmp_path)
    asked = stumbling(monkeypatch)
    (tmp_path / "out").mkdir()
    arguments = base, small, tmp_path / "out", numbered(), 4
    with pytest.raises(OSError, match="No space"):
        write_offsets(*arguments, work=tmp_path / "work")
    write_offsets(*arguments, work=tmp_path / "work")
    assert asked == [0, 1, 2, 2, 3]
    # What is finished is not made again.
    (tmp_path / "again").mkdir()
    write_offsets(base, small, tmp_path / "again", *arguments[3:], work=tmp_path / "work")
    assert asked == [0, 1, 2, 2, 3]
    once, _ = written(tmp_path, base, small, 4)
    for row in (30, 100):
        one = torch.tensor([row])
        assert torch.equal(values(Offsets(tmp_path / "out"), one), values(once, one))


def test_the_step_takes_the_adapter_as_it_was_at_the_end_of_the_part_before(tmp_path):
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
    config = OffsetsConfig(layers=2, rows=12, seed=5, first=4, end=12, correct=False)
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
