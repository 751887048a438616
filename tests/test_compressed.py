"""The compressed form of sparse models: equal to the dense one with zeros, and really smaller."""

import gc
import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from loram.adapter import AdapterConfig, attach
from loram.compressed import CompressedLinear
from loram.errors import UserError
from loram.kept import Kept
from loram.masks import layer_file, of_weights
from loram.masks import packed as bits_of
from loram.model import load, read_config, save
from loram.plan import pruned_size, size
from loram.shards import write_index, write_part
from loram.sparse import compress, sparsify
from loram.train import TrainConfig, train
from tests.conftest import FAMILIES, tiny_model
from tests.rows import TrainerRows
from tests.sparse_models import IDS, SEMI, UNST, logits, make, rows


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
def test_compressed_is_the_dense_model_with_zeros(family, nf4, tmp_path):
    """Logits and gradients of the embeddings, through files; a plain recipe trains on it."""
    make(family, tmp_path, UNST)
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4)
    dense = load(tmp_path / "pruned")
    if nf4:
        quantised_survivors_(dense, tmp_path / "pruned")
    compressed = load(tmp_path / "compressed")
    assert sum(isinstance(m, CompressedLinear) for m in compressed.modules()) == 28
    found = []
    for model in (dense, compressed):
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(IDS).requires_grad_(True)
        out = model(inputs_embeds=embedded).logits
        out.float().square().sum().backward()
        found.append((out.detach(), embedded.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    save(compressed, tmp_path / "resaved")
    assert torch.equal(logits(load(tmp_path / "resaved")), logits(compressed))
    with pytest.raises((ValueError, KeyError), match=f"loram_{family}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")


@pytest.mark.parametrize(
    ("config", "nf4", "target"), [(SEMI, False, 9.1), (SEMI, True, 3.2), (UNST, True, 3.0)]
)
def test_what_was_pruned_is_gone(config, nf4, target, tmp_path):
    """Bits a weight in the file, in the tensors of the process, and by the plan; no dense copy."""
    others = storages()
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    save(tiny_model("llama", **wide).bfloat16(), tmp_path / "base")
    sparsify(tmp_path / "base", tmp_path / "pruned", rows(2), config)
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4)
    weights = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    files = [load_file(file) for file in (tmp_path / "compressed").glob("*.safetensors")]
    parts = [(name, tensor.nbytes) for tensors in files for name, tensor in tensors.items()]
    dense = (
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
        ".bias",
        ".kv_heads",
        ".neurons",
    )
    stored = sum(size for name, size in parts if not name.endswith(dense))
    assert stored == sum(
        size for name, size in parts if name.endswith((".bits", ".survivors", ".scales"))
    )  # the masks too are there once
    assert 8 * stored / weights < target
    del files
    count = size(read_config(tmp_path / "compressed"))
    assert count == pruned_size(read_config(tmp_path / "base"), config)
    held = count.nf4_bytes if nf4 else count.bf16_bytes
    model = attach(load(tmp_path / "compressed"), AdapterConfig(dropout=0.0))
    list(train(model, rows(3), TrainConfig(1, 1e-3, 8)))
    frozen = sum(
        tensor.nbytes
        for pointer, tensor in storages().items()
        if pointer not in others and tensor.dtype != torch.float32
    )
    assert 0.9 * held < frozen < 1.02 * held + 4096


def test_process_memory_holds_the_survivors_alone(tmp_path):
    """What a process has in memory that trained on the model, beside the dense one's."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    model = tiny_model("llama", **shape).bfloat16()
    (tmp_path / "pruned").mkdir()
    weights = 0
    for i, layer in enumerate(model.model.layers):
        masks = {}
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                mask = torch.rand_like(linear.weight, dtype=torch.float32) > 0.5
                linear.weight.data.mul_(mask)
                masks[f"model.layers.{i}.{name}"] = bits_of(mask)
                weights += mask.numel()
        save_file(masks, layer_file(tmp_path / "pruned", i))
    parts = {f"model.layers.{i}": {} for i in range(4)}
    for name, weight in model.state_dict().items():
        parts.setdefault(".".join(name.split(".")[:3]), {})[name] = weight
    for part, tensors in parts.items():
        write_part(tmp_path / "pruned", part, tensors)
    write_index(tmp_path / "pruned")
    model.config.save_pretrained(tmp_path / "pruned")
    Kept.whole(model.config).save(tmp_path / "pruned")
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4=False)
    held = []
    for name in ("pruned", "compressed"):
        child = [sys.executable, "-c", TRAIN, str(tmp_path / name)]
        held.append(int(subprocess.run(child, capture_output=True, text=True, check=True).stdout))
    assert held[0] > 0.95 * 2 * weights
    assert 0.5 * 2 * weights < held[1] < 0.65 * 2 * weights  # 9 bits of 16, and the adapter


TRAIN = """
import ctypes, gc, sys
from pathlib import Path
from loram.adapter import AdapterConfig, attach
from loram.model import load
from loram.train import TrainConfig, train
from tests.sparse_models import rows

def memory():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])  # with what is mapped of files

for _ in range(2):  # what libraries make at their first use is no part of it
    model = None
    before = memory()
    model = load(Path(sys.argv[1]))
    list(train(attach(model, AdapterConfig()), rows(3), TrainConfig(1, 1e-3, 8)))
print(memory() - before)
"""


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


@pytest.mark.parametrize("nf4", [False, True])
def test_stock_peft_and_trainer_train_a_compressed_model(nf4, tmp_path):
    """An adapter that transformers' Trainer made fits the base as it is: shapes did not change."""
    make("llama", tmp_path)
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4)
    small = load(tmp_path / "compressed")
    before = {name: x.clone() for name, x in small.state_dict().items()}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(small, lora)
    settings = TrainingArguments(
        tmp_path / "trainer", max_steps=3, report_to=[], use_cpu=True, save_strategy="no"
    )
    result = Trainer(adapted, settings, train_dataset=TrainerRows()).train()
    assert result.global_step == 3
    for name, x in adapted.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(x, before[name.replace(".base_layer", "")])
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), plain)


def test_a_model_without_masks_is_not_compressed(tmp_path):
    save(tiny_model("llama"), tmp_path / "base")
    with pytest.raises(UserError, match="without masks"):
        compress(tmp_path / "base", tmp_path / "compressed", nf4=False)
