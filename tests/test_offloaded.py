"""Models of which layers wait in memory because the GPU is too small, emulated on the CPU."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader

from loram.adapter import AdapterConfig, attach, open_adapted, save_adapter
from loram.errors import UserError
from loram.evaluate import perplexity
from loram.model import load, read_config, save
from loram.packing import batches
from loram.pruned import model_class
from tests.conftest import tiny_model
from tests.rows import packed_rows
from tests.sparse_models import make


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_rows(tmp_path_factory.mktemp("packed") / "rows", documents=30)


def test_layers_that_do_not_fit_on_the_device_wait_outside(packed, tmp_path):
    save(tiny_model("llama").bfloat16(), tmp_path)
    model, waiting = load(tmp_path), load(tmp_path, device="auto")
    for layer in waiting.model.layers:
        cpu_offload(layer, torch.device("cpu"))  # as `auto` does on a GPU that is too small
        assert {w.device.type for w in layer.parameters()} == {"meta"}
    here, there = (perplexity(m, batches(packed, range(8), 4)) for m in (model, waiting))
    assert here == there
    adapted = attach(model, AdapterConfig(r=2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    reopened = open_adapted(tmp_path, tmp_path / "adapter", device="auto")
    here, there = (perplexity(m, batches(packed, range(8), 4)) for m in (adapted, reopened))
    assert here == there


def test_a_masked_adapter_on_layers_on_disk_is_to_be_merged(tmp_path, monkeypatch):
    make("llama", tmp_path)
    save_adapter(
        attach(load(tmp_path / "pruned"), AdapterConfig(masked=True)), tmp_path / "adapter"
    )

    def on_disk(path, **options):  # as `auto` does where memory is too small as well
        kinds = model_class(read_config(path).model_type)
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {"lm_head": "cpu"} | {f"model.layers.{i}": "disk" for i in range(4)}
        return kinds.from_pretrained(path, device_map=places)

    monkeypatch.setattr("loram.adapter.load", on_disk)
    with pytest.raises(UserError, match="layers wait on disk; accepted: .*`merge`"):
        open_adapted(tmp_path / "pruned", tmp_path / "adapter", device="auto")


@pytest.mark.parametrize("masked", [False, True])
def test_an_adapter_on_layers_that_wait_outside(masked, packed, tmp_path, monkeypatch):
    make("llama", tmp_path)
    adapted = attach(load(tmp_path / "pruned"), AdapterConfig(r=2, masked=masked))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save_adapter(adapted, tmp_path / "adapter")

    def waiting(*given, **options):
        model = load(*given, **options)
        for layer in model.model.layers[1:]:
            held = {name: weight.detach() for name, weight in layer.state_dict().items()}
            cpu_offload(layer, torch.device("cpu"), state_dict=OffloadedWeightsLoader(held))
        names = ["embed_tokens", *(f"layers.{i}" for i in range(4)), "norm", "rotary_emb"]
        model.hf_device_map = dict.fromkeys([f"model.{n}" for n in names] + ["lm_head"], "cpu")
        return model

    def hooked(model, plan, **options):  # where there is no GPU accelerate would not
        for layer in model.get_base_model().model.layers[1:]:
            cpu_offload(layer, torch.device("cpu"), **options)

    monkeypatch.setattr("loram.adapter.load", waiting)
    monkeypatch.setattr("loram.adapter.dispatch_model", hooked)
    reopened = open_adapted(tmp_path / "pruned", tmp_path / "adapter", device="auto")
    here, there = (perplexity(m, batches(packed, range(8), 4)) for m in (adapted, reopened))
    assert here == there
