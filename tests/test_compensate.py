"""Compensation: its laws on every model family and every pruning, through files and training."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import loram.compensate
from loram.adapter import AdapterConfig, attach, recover, save_adapter
from loram.compensate import CompensateConfig, compensate
from loram.errors import UserError
from loram.kept import Kept
from loram.model import load, read_config, save
from loram.plan import planned_config, size
from loram.prune import PruneConfig, choose, prune
from loram.ridge import Fit
from loram.shards import Checkpoint
from loram.sparse import pack, sparsify
from loram.stand_in import StandIn
from loram.taylor import random_scores
from loram.train import TrainConfig, train
from tests.conftest import FAMILIES, tiny_model

CUT = PruneConfig("rand", 0.5, keep_first=1, keep_last=1, seed=3)
# Structured pruning on every family, single weights on two.
PRUNINGS = [*((family, "rand") for family in FAMILIES), ("llama", "semi"), ("qwen3", "unst")]
ADAPTER = AdapterConfig(r=4, alpha=8, dropout=0.0)
NEAR_ZERO = 1e-9  # damping


def rows(seed: int, count: int = 8, length: int = 48, document: int = 12) -> list[dict]:
    """Random ids in two batches; documents of `document` tokens that do not see one another."""
    ids = torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(document).repeat(length // document)[None].repeat(count, 1)
    whole = {"input_ids": ids, "labels": ids, "position_ids": positions, "row": torch.arange(count)}
    half = count // 2
    return [{k: v[:half] for k, v in whole.items()}, {k: v[half:] for k, v in whole.items()}]


def logits(model, document: int = 12) -> torch.Tensor:
    """On tokens that nothing was fitted on."""
    batch = rows(99, document=document)[0]
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        return model(**given, use_cache=False).logits.float()


def make(root: Path, family: str, method: str = "rand", rank: int = 4, model=None, **options):
    """root/base, its pruned copy root/pruned and the compensated one root/small."""
    full = model or tiny_model(family)
    save(full, root / "base")
    if method == "rand":
        kept = choose(random_scores(full.config, 3), full.config, CUT)
        prune(root / "base", root / "pruned", kept)
    else:
        sparsify(root / "base", root / "pruned", rows(2), PruneConfig(method))
    return again(root, rank, **options)


def again(root: Path, rank: int, out: str = "small", batches=None, damping=1e-2, **options):
    config = CompensateConfig(rank=rank, damping=damping)
    batches = batches or rows(2, 64)
    return compensate(root / "base", root / "pruned", root / out, batches, config, **options)


def distance(root: Path, small: Path, document: int = 12) -> float:
    """Mean squared difference of the logits to those of the full model."""
    full, other = (load(path, dtype=torch.float32) for path in (root / "base", small))
    return float((logits(full, document) - logits(other, document)).square().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_attention_is_made_up_for_exactly(family, tmp_path):
    """In documents of one token attention is linear in its input: the compensated model is the
    large one."""
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.bias", "o_proj.bias")):
            parameter.data.zero_()  # linear, not affine
    save(model, tmp_path / "base")
    whole = Kept.whole(model.config)
    kept = Kept((torch.tensor([1, 3]),) * 4, whole.neurons)
    prune(tmp_path / "base", tmp_path / "pruned", kept)
    again(tmp_path, 64, batches=rows(2, 64, document=1), damping=NEAR_ZERO)
    before = distance(tmp_path, tmp_path / "pruned", document=1)
    assert before > 0.01
    assert distance(tmp_path, tmp_path / "small", document=1) < 1e-6 * before


@pytest.mark.parametrize("method", ["rand", "semi", "unst"])
def test_a_linear_model_is_made_up_for_exactly(method, tmp_path):
    """With gates that do not depend on the input the MLP is linear too; every pruning."""
    model = tiny_model("llama", mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_proj.weight", "v_proj.bias", "up_proj.bias")):
            parameter.data.zero_()
    options = {"batches": rows(2, 64, document=1), "damping": NEAR_ZERO}
    make(tmp_path, "llama", method, rank=64, model=model, **options)
    before = distance(tmp_path, tmp_path / "pruned", document=1)
    assert before > 0.01
    assert distance(tmp_path, tmp_path / "small", document=1) < 1e-6 * before


@pytest.mark.parametrize(("family", "method"), PRUNINGS)
def test_kept_weights_stay_and_more_rank_is_nearer(family, method, tmp_path):
    found = make(tmp_path, family, method)
    again(tmp_path, 64, "wide")
    pruned, small = Checkpoint(tmp_path / "pruned"), Checkpoint(tmp_path / "small")
    for name in pruned.names():
        assert torch.equal(pruned.read(name), small.read(name))
    added = set(small.names()) - set(pruned.names())
    layers = range(1, 3) if method == "rand" else range(4)
    assert added == {
        f"model.layers.{i}.{block}.stand_in.{x}"
        for i in layers
        for block in ("self_attn", "mlp")
        for x in "PQ"
    }
    assert 0 < found["missing"] < 1 and found["tokens"] == 64 * 48
    distances = [distance(tmp_path, tmp_path / name) for name in ("pruned", "small", "wide")]
    assert distances == sorted(distances, reverse=True) and distances[2] < 0.9 * distances[0]


def test_full_rank_is_the_unreduced_fit():
    """And a lower rank is the best of that rank in the metric of the output."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    x = torch.randn(400, 24, generator=generator) @ mix
    missing = torch.randn(400, 24, generator=generator) + 0.1 * x @ mix
    fit = Fit(24, torch.device("cpu"))
    fit.add(x[:100], missing[:100])
    fit.add(x[100:], missing[100:])
    gram = (x.T @ x).double()
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(24)
    c = torch.linalg.solve(gram, (x.T @ missing).double())
    p, q = fit.solve(24, 1e-2)
    assert (p @ q - c).abs().max() < 1e-4 * c.abs().max()
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(lower.T @ c)
    best = torch.linalg.solve(lower.T, u[:, :5] * s[:5]) @ v[:5]
    p, q = fit.solve(5, 1e-2)
    assert (p @ q - best).abs().max() < 1e-4 * best.abs().max()
    left = (missing - x @ (p @ q).float()).square().sum() / missing.square().sum()
    assert fit.left(p, q) == pytest.approx(float(left), rel=1e-4)


def test_the_fit_follows_the_large_model_not_the_layer_alone(tmp_path, monkeypatch):
    """What earlier layers still miss is made up for too: without it the result is further away."""
    make(tmp_path, "llama", rank=64)
    original = loram.compensate._Streams.large

    def large(self, number, layer):
        for n, batch in enumerate(self.batches):
            g = self.read(f"small-{number}", n)
            yield g + loram.compensate._output(self.full, layer, number, g, batch)

    monkeypatch.setattr(loram.compensate._Streams, "large", large)
    again(tmp_path, 64, "alone")
    monkeypatch.setattr(loram.compensate._Streams, "large", original)
    near, alone = (distance(tmp_path, tmp_path / name) for name in ("small", "alone"))
    assert near < alone


def test_padding_is_not_fitted_on(tmp_path):
    make(tmp_path, "llama", batches=rows(2, 64))
    padded = []
    for batch in rows(2, 64):
        pad = {"input_ids": 0, "labels": -100, "position_ids": 0}
        more = {name: torch.full((32, 9), value) for name, value in pad.items()}
        padded.append({name: torch.cat([batch[name], more[name]], 1) for name in pad})
    found = again(tmp_path, 4, "padded", batches=padded)
    assert found["tokens"] == 64 * 48
    first, second = Checkpoint(tmp_path / "small"), Checkpoint(tmp_path / "padded")
    for name in first.names():
        assert torch.allclose(first.read(name), second.read(name), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mistral", "bf16"),
        *((family, "nf4") for family in FAMILIES),
        ("qwen2", "packed"),
        ("llama", "packed nf4"),
        ("qwen3", "packed nf4"),
    ],
)
def test_reloads_bit_equal_and_stand_ins_stay_in_bf16(family, kind, tmp_path):
    model = tiny_model(family).bfloat16()
    make(tmp_path, family, "unst" if "packed" in kind else "rand", model=model)
    directory, nf4 = tmp_path / "small", kind == "nf4"
    if "packed" in kind:
        pack(tmp_path / "small", tmp_path / "packed", nf4="nf4" in kind)
        directory = tmp_path / "packed"
    model = load(directory, nf4=nf4)
    save(model, tmp_path / "again")
    reloaded = load(tmp_path / "again")
    first, second = model.state_dict(), reloaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(logits(model), logits(reloaded))
    made = load_file(tmp_path / "small" / "model-layers-00001-mlp.safetensors")
    for x in "PQ":
        name = f"model.layers.1.mlp.stand_in.{x}"
        assert first[name].dtype == torch.bfloat16 and torch.equal(first[name], made[name])
    without = {n: v for n, v in first.items() if "stand_in" not in n}
    assert len(without) < len(first)


def test_counted_by_the_plan(tmp_path):
    make(tmp_path, "llama", rank=4)
    full = read_config(tmp_path / "base")
    before, after = size(read_config(tmp_path / "pruned")), size(read_config(tmp_path / "small"))
    stand_ins = 2 * 2 * (64 * 4 + 4 * 64)
    assert after.total - before.total == after.stand_ins == stand_ins
    assert after.bf16_bytes - before.bf16_bytes == 2 * stand_ins
    assert after.nf4_bytes - before.nf4_bytes == 2 * stand_ins
    assert after.linears == before.linears
    assert size(planned_config(full, CUT, rank=4)) == after
    sparse = size(planned_config(full, PruneConfig("semi"), rank=4))
    assert sparse.stand_ins == 2 * stand_ins


def trained(root: Path, model: str, adapter: str, **options) -> None:
    small = attach(load(root / model, **options), ADAPTER, seed=1)
    list(train(small, rows(5) * 2, TrainConfig(2, 1e-2, 8)))
    save_adapter(small, root / adapter)


@pytest.mark.parametrize(("family", "method"), PRUNINGS)
def test_recovered_adapter_is_one_of_the_full_model(family, method, tmp_path):
    """The same keys and shapes with compensation as without; stock PEFT opens it."""
    make(tmp_path, family, method)
    if method != "rand":
        pack(tmp_path / "small", tmp_path / "packed", nf4=True)
    with_nf4 = {"nf4": True} if method == "rand" else {}
    trained(tmp_path, "small" if method == "rand" else "packed", "adapter", **with_nf4)
    trained(tmp_path, "pruned", "plain")
    found = []
    for name in ("adapter", "plain"):
        out = tmp_path / f"recovered-{name}"
        recover(tmp_path / name, tmp_path / "small", tmp_path / "base", out)
        tensors = load_file(out / "adapter_model.safetensors")
        found.append({k: v.shape for k, v in tensors.items()})
    assert found[0] == found[1]
    base = load(tmp_path / "base", dtype=torch.float32)
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "recovered-adapter")
    assert not torch.equal(logits(adapted), before)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v[index % 4] for k, v in rows(5)[0].items() if k != "row"}


def test_stock_peft_and_trainer_leave_stand_ins_alone(tmp_path):
    make(tmp_path, "qwen3")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = load(tmp_path / "small")
    before = {n: p.clone() for n, p in model.named_parameters() if "stand_in" in n}
    small = get_peft_model(model, lora)
    assert not any("stand_in" in n for n, p in small.named_parameters() if "lora_" in n)
    settings = TrainingArguments(
        tmp_path / "trainer", max_steps=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(small, settings, train_dataset=Rows()).train()
    after = {n: p for n, p in small.named_parameters() if "stand_in" in n}
    assert len(after) == len(before) == 8
    for (_, old), new in zip(before.items(), after.values(), strict=True):
        assert torch.equal(old, new)
    small.save_pretrained(tmp_path / "adapter")
    recover(tmp_path / "adapter", tmp_path / "small", tmp_path / "base", tmp_path / "recovered")
    base = load(tmp_path / "base")
    assert PeftModel.from_pretrained(base, tmp_path / "recovered") is not None


def test_the_stand_in_acts_in_the_model(tmp_path):
    """By hand against the module; also through the KV cache and with gradients to the input."""
    make(tmp_path, "llama")
    model = load(tmp_path / "small", dtype=torch.float32)
    blocks = [m for m in model.modules() if isinstance(m, StandIn)]
    assert len(blocks) == 4
    x = torch.randn(2, 3, 64, requires_grad=True)
    mlp = model.model.layers[1].mlp
    plain = load(tmp_path / "pruned", dtype=torch.float32).model.layers[1].mlp
    expected = plain(x) + (x @ mlp.stand_in.P) @ mlp.stand_in.Q
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    ids = torch.arange(3, 20)[None]
    whole = model(input_ids=ids).logits[:, -1]
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    last = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(whole, last, atol=1e-4)


def test_ratio_0_trains_the_adapter_of_the_full_model(tmp_path):
    """Nothing is removed, so nothing stands in, and the whole gain is kept."""
    full = tiny_model("llama")
    save(full, tmp_path / "base")
    config = dataclasses.replace(CUT, ratio=0.0)
    kept = choose(random_scores(full.config, 3), full.config, config)
    prune(tmp_path / "base", tmp_path / "pruned", kept)
    again(tmp_path, 8)
    assert size(read_config(tmp_path / "small")) == size(full.config)
    trained(tmp_path, "base", "lora")
    trained(tmp_path, "small", "adapter")
    recover(tmp_path / "adapter", tmp_path / "small", tmp_path / "base", tmp_path / "recovered")
    first = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    second = load_file(tmp_path / "recovered" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_crash_half_way_goes_on_at_the_sub_block(tmp_path, monkeypatch):
    make(tmp_path, "llama", "semi")
    done, original = [], loram.compensate.write_part

    def write_part(out, part, tensors):
        if part == "model.layers.2.mlp" and "crash" not in done:
            done.append("crash")
            raise OSError(28, "No space left on device")
        done.append(part)
        original(out, part, tensors)

    monkeypatch.setattr(loram.compensate, "write_part", write_part)
    with pytest.raises(OSError, match="No space"):
        again(tmp_path, 4, "again", work=tmp_path / "work")
    assert not (tmp_path / "again").exists()
    again(tmp_path, 4, "again", work=tmp_path / "work")
    assert done[done.index("crash") + 1] == "model.layers.2.mlp"
    assert done.count("model.layers.1.mlp") == 1
    for file in (tmp_path / "small").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not (tmp_path / "work" / "activations").exists()


def test_bad_input_is_named(tmp_path):
    make(tmp_path, "llama")
    with pytest.raises(ValueError, match="no token to predict"):
        compensate(tmp_path / "base", tmp_path / "pruned", tmp_path / "x", [], CompensateConfig(4))
    with pytest.raises(UserError, match="compensated already"):
        compensate(
            tmp_path / "base", tmp_path / "small", tmp_path / "x", rows(2), CompensateConfig(4)
        )
