"""SparseGPT over whole models, their masks, and their packed form."""

import gc
import json

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_sparsegpt import by_definition
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

import loram.layers
import loram.sparse
from loram.adapter import AdapterConfig, attach, merge, open_adapted, recover, save_adapter
from loram.errors import UserError
from loram.masks import layer_masks, of_weights, unpacked
from loram.model import load, read_config, save
from loram.packed import PackedLinear
from loram.plan import pruned_size, size
from loram.prune import PruneConfig, pattern
from loram.sparse import SHARED, pack, sparsify
from loram.train import TrainConfig, train, train_all_
from tests.conftest import FAMILIES, tiny_model

SEMI, UNST = PruneConfig("semi"), PruneConfig("unst")
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def rows(seed: int, count: int = 8, length: int = 48) -> list[dict[str, torch.Tensor]]:
    """Calibration in two batches; each row is two documents that must not see one another."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length // 2).repeat(2)[None].repeat(count, 1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return [{k: v[: count // 2] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def make(family: str, root, config: PruneConfig = SEMI) -> dict[str, float]:
    save(tiny_model(family), root / "base")
    return sparsify(root / "base", root / "pruned", rows(2), config)


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


def model_gap(root, family: str, config: PruneConfig) -> float:
    """Largest difference of a weight against `in_memory`; infinite if a mask differs."""
    make(family, root, config)
    expected, masks = in_memory(family, config)
    found = load(root / "pruned", dtype=torch.float32)
    for i in range(4):
        for name, bits in layer_masks(root / "pruned", i).items():
            if not torch.equal(unpacked(bits, masks[name].shape[1]), masks[name]):
                return float("inf")
    assert len(masks) == 4 * 7
    pairs = zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("config", [SEMI, UNST])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_the_whole_model(family, config, tmp_path):
    assert model_gap(tmp_path, family, config) < 1e-3


def test_errors_that_do_not_reach_the_next_layer_are_noticed(tmp_path, monkeypatch):
    full = tiny_model("llama").model.layers
    original = loram.sparse.forward

    def forward(layers, i, layer, batches, spool):
        return original(layers, i, full[i], batches, spool)

    make("llama", tmp_path)
    monkeypatch.setattr(loram.sparse, "forward", forward)
    assert model_gap(tmp_path / "faulty", "llama", SEMI) > 1e-2


def test_another_layers_inputs_are_noticed(tmp_path, monkeypatch):
    original = loram.layers.Spool.read

    def read(self, name, number):
        earlier = self.directory / "input-0"
        return original(self, "input-0" if earlier.exists() else name, 0)

    monkeypatch.setattr(loram.layers.Spool, "read", read)
    monkeypatch.setattr(loram.layers.Spool, "drop", lambda *_: None)
    assert model_gap(tmp_path, "llama", SEMI) > 1e-2


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
    assert not (tmp_path / "work" / "activations").exists()


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="5:7, which does not divide the 64 inputs of model.layers"):
        make("llama", tmp_path, PruneConfig("semi", pattern="5:7"))
    with pytest.raises(ValueError, match="no calibration rows"):
        sparsify(tmp_path / "base", tmp_path / "out", [], SEMI)
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    save(model, tmp_path / "bad")
    with pytest.raises(ValueError, match="NaN or Inf in the weights of model.layers.1.mlp.up_proj"):
        sparsify(tmp_path / "bad", tmp_path / "out", rows(2), SEMI)
    with pytest.raises(UserError, match="without masks"):
        pack(tmp_path / "base", tmp_path / "packed", nf4=False)


def aligned(root, masks: bool = True):
    """Four steps of training all weights, with or without the masks."""
    model = train_all_(load(root / "pruned", dtype=torch.float32))
    given = of_weights(model, root / "pruned") if masks else None
    batches = [b | {"row": torch.arange(4)} for b in rows(3) * 4]
    list(
        train(
            model, batches, TrainConfig(4, 1e-2, 8, warmup_steps=1, weight_decay=0.1), masks=given
        )
    )
    return model


def test_masks_survive_alignment(tmp_path):
    make("llama", tmp_path, UNST)
    model, before = aligned(tmp_path), load(tmp_path / "pruned", dtype=torch.float32)
    for weight, mask in of_weights(model, tmp_path / "pruned").items():
        assert torch.equal(weight == 0, ~mask)
    assert not torch.equal(logits(model), logits(before))


def test_a_mask_lost_in_alignment_is_noticed(tmp_path):
    make("llama", tmp_path, UNST)
    model = aligned(tmp_path, masks=False)
    assert not all(
        torch.equal(w == 0, ~mask) for w, mask in of_weights(model, tmp_path / "pruned").items()
    )


def quantised_survivors_(model, directory) -> None:
    """Survivors put through NF4 as one vector, in the dense model."""
    for weight, mask in of_weights(model, directory).items():
        values = weight.data[mask].bfloat16()
        codes, state = bnb.quantize_4bit(
            values, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        weight.data[mask] = bnb.dequantize_4bit(codes, state).to(weight.dtype)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_the_dense_model_with_zeros(family, nf4, tmp_path):
    """Logits and gradients of the embeddings, through files; a plain recipe trains on it."""
    make(family, tmp_path, UNST)
    pack(tmp_path / "pruned", tmp_path / "packed", nf4)
    dense = load(tmp_path / "pruned")
    if nf4:
        quantised_survivors_(dense, tmp_path / "pruned")
    packed = load(tmp_path / "packed")
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 28
    found = []
    for model in (dense, packed):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(IDS).requires_grad_(True)
        out = model(inputs_embeds=embedded).logits
        out.float().square().sum().backward()
        found.append((out.detach(), embedded.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    save(packed, tmp_path / "resaved")
    assert torch.equal(logits(load(tmp_path / "resaved")), logits(packed))
    with pytest.raises((ValueError, KeyError), match=f"loram_{family}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize(
    ("config", "nf4", "target"), [(SEMI, False, 9.1), (SEMI, True, 3.2), (UNST, True, 3.0)]
)
def test_what_was_pruned_is_gone(config, nf4, target, tmp_path):
    """Bits a weight in the file, in the tensors of the process, and by the plan; no dense copy."""
    others = storages()
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    save(tiny_model("llama", **wide).bfloat16(), tmp_path / "base")
    sparsify(tmp_path / "base", tmp_path / "pruned", rows(2), config)
    pack(tmp_path / "pruned", tmp_path / "packed", nf4)
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    stored = sum(
        tensor.nbytes
        for file in (tmp_path / "packed").glob("model-*.safetensors")
        for name, tensor in load_file(file).items()
        if name.rsplit(".", 1)[-1] in ("bits", "survivors", "scales")
    )
    assert 8 * stored / weights < target
    count = size(read_config(tmp_path / "packed"))
    assert count == pruned_size(read_config(tmp_path / "base"), config)
    held = count.nf4_bytes if nf4 else count.bf16_bytes
    model = attach(load(tmp_path / "packed"), AdapterConfig(dropout=0.0))
    batches = [b | {"row": torch.arange(4)} for b in rows(3)]
    list(train(model, batches, TrainConfig(1, 1e-3, 8)))
    frozen = sum(
        tensor.nbytes
        for pointer, tensor in storages().items()
        if pointer not in others and tensor.dtype != torch.float32
    )
    assert 0.9 * held < frozen < 1.02 * held + 4096


def storages() -> dict[int, torch.Tensor]:
    """Every tensor that lives, by the address of its storage, other than small ones and ids.

    The tensors are held on to, so an address in an earlier answer is not given out again.
    """
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or isinstance(thing, FakeTensor):
            continue
        if thing.is_meta or thing.dtype == torch.int64 or thing.numel() <= 4096:
            continue
        if thing.untyped_storage().nbytes():
            found[thing.untyped_storage().data_ptr()] = thing
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_recovered_and_merged(family, masked, tmp_path):
    """On the packed model; then the same update on the untouched base, through files."""
    make(family, tmp_path)
    pack(tmp_path / "pruned", tmp_path / "packed", nf4=False)
    lora = AdapterConfig(r=4, alpha=8, dropout=0.0, masked=masked)
    model = attach(load(tmp_path / "packed"), lora, seed=1)
    batches = [b | {"row": torch.arange(4)} for b in rows(3) * 2]
    list(train(model, batches, TrainConfig(2, 1e-2, 8)))
    save_adapter(model, tmp_path / "adapter")
    pruned, base = tmp_path / "pruned", tmp_path / "base"
    recover(tmp_path / "adapter", pruned, base, tmp_path / "recovered")
    opened = open_adapted(base, tmp_path / "recovered", dtype=torch.float32)
    merge(base, tmp_path / "recovered", tmp_path / "merged", dtype=torch.float32)
    full, merged = load(base, dtype=torch.float32), load(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - logits(opened)).abs().max() < 1e-4
    assert (logits(merged) - logits(full)).abs().max() > 1e-3
    trained = open_adapted(tmp_path / "packed", tmp_path / "adapter")
    assert torch.equal(logits(trained), logits(model.eval()))
    masks = {name: bits for i in range(4) for name, bits in layer_masks(pruned, i).items()}
    outside = 0.0
    for name, bits in masks.items():
        before, after = (m.get_submodule(name).weight.detach() for m in (full, merged))
        gone = ~unpacked(bits, before.shape[1])
        outside = max(outside, float((after - before)[gone].abs().max()))
    if masked:
        assert outside == 0
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
