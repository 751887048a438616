"""Offsets: the small model, put where the large one is, and what trains there."""

import weakref

import pytest
import torch

import loram.layers
import loram.offsets
from loram.adapter import attach
from loram.errors import UserError
from loram.loss import CausalLoss
from loram.model import load, save
from loram.offsets import OffsetConfig, OffsetLoss, Offsets, corrected, offset_bytes, write_offsets
from loram.prune import PruneConfig
from loram.sparse import compress, sparsify
from loram.train import TrainConfig, train
from tests.conftest import FAMILIES, tiny_model
from tests.offsetting import ADAPTER, distance, small_and_large, state, values, written
from tests.test_distil import numbered, stumbling
from tests.test_sparse import rows


def test_the_last_layer_is_always_among_them():
    config = tiny_model("llama").config
    found = {every: corrected(config, every) for every in range(6)}
    each = [1, 2, 3, 4]
    assert found == {0: [], 1: each, 2: [2, 4], 3: [3, 4], 4: [4], 5: [4]}


def test_parts_of_a_training_follow_each_other():
    assert OffsetConfig(1).spans(20) == [(0, 20)]
    assert OffsetConfig(1, parts=3).spans(20) == [(0, 7), (7, 13), (13, 20)]
    assert OffsetConfig(1, parts=9).spans(2) == [(0, 1), (1, 2)]


@pytest.mark.parametrize(("every", "layers"), [(4, 1), (3, 2), (1, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_small_model_answers_as_the_large_one(
    family, every, layers, tmp_path
):
    base, small = small_and_large(family, tmp_path)
    offsets, found = written(tmp_path, base, small, every)
    positions = 8 * 48
    assert found["tokens"] == positions
    planned = offset_bytes(load(base).config, every, positions)
    assert planned == positions * layers * (64 + 4)
    assert 0 < found["bytes"] - planned < 2 * 300
    module = OffsetLoss(attach(load(small, dtype=torch.float32), ADAPTER), offsets.layers)
    for batch in numbered():
        large = state(CausalLoss(load(base, dtype=torch.float32)), batch)
        there = state(module, batch | offsets.fetch(batch["row"]))
        assert distance(there, large) < 0.04 * distance(state(module, batch), large)


def test_rounding_does_not_add_up(tmp_path):
    """After each layer the stream is off by what one offset rounds off."""
    base, small = small_and_large("llama", tmp_path)
    offsets, _ = written(tmp_path, base, small, 1)
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


@pytest.mark.parametrize("kind", ["nf4", "compressed", "compressed nf4"])
def test_they_make_up_for_nf4_and_for_single_weights(kind, tmp_path):
    base, small = small_and_large("llama", tmp_path)
    if kind == "nf4":
        save(load(small, nf4=True), tmp_path / "trained")
    else:
        sparsify(base, tmp_path / "sparse", rows(4), PruneConfig("semi"), work=tmp_path / "s")
        compress(tmp_path / "sparse", tmp_path / "trained", nf4="nf4" in kind)
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


def test_a_small_model_is_gone_before_the_large_one_is_read_again(tmp_path, monkeypatch):
    base, small = small_and_large("llama", tmp_path)
    save(load(small, nf4=True), tmp_path / "trained")
    trained, read, layer, made = [], [], loram.layers.Layers.layer, loram.offsets._trained

    def small_one(*given, **options):
        model = made(*given, **options)
        trained.append(weakref.ref(model.model.layers[0].mlp.up_proj.weight))
        return model

    def large_layer(self, i):
        read.append(i)
        assert all(weight() is None for weight in trained)
        return layer(self, i)

    monkeypatch.setattr(loram.layers, "HELD", 1)
    monkeypatch.setattr(loram.offsets, "_trained", small_one)
    monkeypatch.setattr(loram.layers.Layers, "layer", large_layer)
    written(tmp_path, base, tmp_path / "trained", 1)
    assert read == [0, 1, 2, 3] * 2 and len(trained) == 2


def test_without_layers_there_is_nothing_to_find(tmp_path):
    with pytest.raises(UserError, match="offset.every: found 0"):
        write_offsets("base", tmp_path, tmp_path / "out", numbered(), 0, work=tmp_path / "work")


def test_a_crash_half_way_goes_on_at_the_part(tmp_path, monkeypatch):
    base, small = small_and_large("llama", tmp_path)
    asked = stumbling(monkeypatch)
    (tmp_path / "out").mkdir()
    arguments = base, small, tmp_path / "out", numbered(), 1
    with pytest.raises(OSError, match="No space"):
        write_offsets(*arguments, work=tmp_path / "work")
    write_offsets(*arguments, work=tmp_path / "work")
    assert asked == [0, 1, 2, 3, 0, 1] + [0, 1, 2, 3]
    monkeypatch.undo()
    # Of a call that ended nothing is left for another one.
    assert not list((tmp_path / "work").iterdir())
    once, _ = written(tmp_path, base, small, 1)
    for row in (30, 100):
        one = torch.tensor([row])
        assert torch.equal(values(Offsets(tmp_path / "out"), one), values(once, one))
