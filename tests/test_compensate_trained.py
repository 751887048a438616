"""A compensated model: opened, counted, trained beside, its adapter recovered."""

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from loram.adapter import AdapterConfig, attach, recover, save_adapter
from loram.model import load, read_config, save
from loram.plan import planned_config, size
from loram.prune import PruneConfig, choose, prune
from loram.sparse import compress
from loram.stand_in import StandIn
from loram.taylor import random_scores
from loram.train import TrainConfig, train
from tests.compensated import CUT, PRUNINGS, again, logits, make, rows
from tests.conftest import FAMILIES, tiny_model

ADAPTER = AdapterConfig(r=4, alpha=8, dropout=0.0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mistral", "bf16"),
        *((family, "nf4") for family in FAMILIES),
        ("qwen2", "compressed"),
        ("llama", "compressed nf4"),
        ("qwen3", "compressed nf4"),
    ],
)
def test_reloads_bit_equal_and_stand_ins_stay_in_bf16(family, kind, tmp_path):
    model = tiny_model(family).bfloat16()
    make(tmp_path, family, "unst" if "compressed" in kind else "rand", model=model)
    directory, nf4 = tmp_path / "small", kind == "nf4"
    if "compressed" in kind:
        compress(tmp_path / "small", tmp_path / "compressed", nf4="nf4" in kind)
        directory = tmp_path / "compressed"
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
        compress(tmp_path / "small", tmp_path / "compressed", nf4=True)
    with_nf4 = {"nf4": True} if method == "rand" else {}
    trained(tmp_path, "small" if method == "rand" else "compressed", "adapter", **with_nf4)
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
