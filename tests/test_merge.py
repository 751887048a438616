"""An adapter that is added to the weights of its model, beside PEFT's own merging."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loram.adapter import AdapterConfig, attach, open_adapted, recover, save_adapter
from loram.adapter_files import shapes
from loram.errors import UserError
from loram.kept import Kept
from loram.layers import Layers
from loram.merge import merge
from loram.model import load, save
from loram.prune import prune
from loram.sparse import compress
from tests.conftest import FAMILIES, tiny_model
from tests.sparse_models import make as make_sparse
from tests.test_laws import ADAPTER, logits, make, trained


def weights(directory) -> dict[str, torch.Tensor]:
    return {
        k: v for file in directory.glob("model*.safetensors") for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family, tmp_path):
    make(family, tmp_path)
    trained(tmp_path)
    recover(tmp_path / "adapter", tmp_path / "pruned", tmp_path / "base", tmp_path / "recovered")
    expected = logits(open_adapted(tmp_path / "base", tmp_path / "recovered", dtype=torch.float32))
    merge(tmp_path / "base", tmp_path / "recovered", tmp_path / "merged")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_sum_is_rounded_once_and_all_else_stays_as_it_was(dtype, tmp_path):
    """In 16 bits: what PEFT makes in float32, rounded; LLaMA-2 is published in float16."""
    save(tiny_model("qwen2").to(dtype), tmp_path / "base")
    adapted = attach(load(tmp_path / "base", dtype=torch.float32), ADAPTER)
    generator = torch.Generator().manual_seed(6)
    for name, factor in adapted.named_parameters():
        if "lora_B" in name:
            factor.data = torch.randn(factor.shape, generator=generator) * 0.1
    save_adapter(adapted, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "merged")
    wanted = adapted.merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == dtype
        changed = name.endswith("proj.weight")
        assert torch.equal(weight, before[name]) is not changed, name
        if changed:
            # The last bit of the product depends on how it was multiplied.
            apart = (weight.float() - wanted[name].to(dtype).float()).abs() / weight.float().abs()
            assert (apart > 0).float().mean() < 1e-3 and apart.max() < 2e-2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == dtype


def refused(message: str, *words) -> None:
    """In one line, and nothing is written."""
    with pytest.raises(UserError, match=message):
        merge(*words)
    assert not words[-1].exists()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    """Not yet recovered, say."""
    make("llama", tmp_path)
    trained(tmp_path)
    words = tmp_path / "base", tmp_path / "adapter"
    refused(r"adapter: found .*lora_A of shape .* accepted: 96 along dim 1", *words, tmp_path / "o")
    with pytest.raises(UserError, match="96 along dim 1"):
        open_adapted(*words)
    with pytest.raises(UserError, match="of 4; accepted: a model of 3 layers"):
        make("llama", tmp_path / "other", num_hidden_layers=3)
        recover(words[1], tmp_path / "other" / "pruned", words[0], tmp_path / "recovered")
    with pytest.raises(UserError, match="pruned: found .* without kept.safetensors"):
        recover(words[1], words[0], tmp_path / "pruned", tmp_path / "recovered")
    assert not (tmp_path / "recovered").exists()


def test_weights_that_cannot_take_it_are_refused(tmp_path):
    make_sparse("llama", tmp_path)
    compress(tmp_path / "pruned", tmp_path / "compressed", nf4=False)
    save_adapter(attach(load(tmp_path / "compressed"), ADAPTER), tmp_path / "adapter")
    save(load(tmp_path / "pruned", nf4=True), tmp_path / "nf4")
    kept = Kept.load(tmp_path / "pruned")
    for base in (tmp_path / "compressed", tmp_path / "nf4"):
        refused(
            "base: found .*, quantised or compressed", base, tmp_path / "adapter", tmp_path / "out"
        )
        with pytest.raises(UserError, match="model: found .*, quantised or compressed"):
            Layers(base)
        with pytest.raises(UserError, match="model: found .*, quantised or compressed"):
            prune(base, tmp_path / "out", kept)
        assert not (tmp_path / "out").exists()


def test_what_peft_saved_along_with_an_adapter(tmp_path):
    """Embeddings that were adapted are the small model's and stay behind; a head that was trained
    goes along, but is nothing to merge."""
    make("llama", tmp_path)
    small = load(tmp_path / "pruned", dtype=torch.float32)
    small.model.embed_tokens.weight.data += 1  # as alignment may
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    adapted = get_peft_model(small, lora)
    adapted.lm_head.modules_to_save["default"].weight.data.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    words = tmp_path / "adapter", tmp_path / "pruned", tmp_path / "base", tmp_path / "recovered"
    recover(*words)
    base = load(tmp_path / "base", dtype=torch.float32)
    before = base.model.embed_tokens.weight.clone()
    opened = PeftModel.from_pretrained(base, tmp_path / "recovered")
    after = opened.base_model.model.model.embed_tokens
    assert torch.equal(after.base_layer.weight, before) and "default" in after.lora_embedding_A
    assert (opened.lm_head.modules_to_save["default"].weight == 0.5).all()
    refused("lora_A and lora_B of linears alone", words[2], words[3], tmp_path / "out")
    config = json.loads((words[0] / "adapter_config.json").read_text())
    config["modules_to_save"] = None  # so the head is one that was only saved along
    (words[0] / "adapter_config.json").write_text(json.dumps(config))
    recover(*words[:3], tmp_path / "without")
    assert not any("lm_head" in name for name in shapes(tmp_path / "without"))
    config["modules_to_save"] = ["down_proj"]
    (words[0] / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="modules_to_save: found model.layers.1.mlp.down_proj"):
        recover(*words[:3], tmp_path / "out")


def test_an_output_head_is_merged_unless_it_is_the_embeddings(tmp_path):
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        save(model, tmp_path / f"{tied}")
        adapted = attach(model, AdapterConfig(r=2, targets=("lm_head",)))
        adapted.base_model.model.lm_head.lora_B["default"].weight.data.fill_(0.1)
        save_adapter(adapted, tmp_path / f"{tied}-adapter")
    merge(tmp_path / "False", tmp_path / "False-adapter", tmp_path / "merged")
    expected = logits(
        open_adapted(tmp_path / "False", tmp_path / "False-adapter", dtype=torch.float32)
    )
    assert (logits(load(tmp_path / "merged", dtype=torch.float32)) - expected).abs().max() < 1e-4
    words = tmp_path / "True", tmp_path / "True-adapter", tmp_path / "out"
    refused("an update of lm_head, which is tied", *words)
