"""Estimated peaks of training against the tensor bytes that torch's profiler sees."""

from pathlib import Path

import pytest
import torch

from loram.adapter import AdapterConfig, attach
from loram.by_row import to_float8
from loram.distil import DistilConfig, DistilLoss
from loram.loss import CausalLoss
from loram.masks import of_weights
from loram.memory import align_bytes, sft_bytes
from loram.model import load, read_config
from loram.offsets import OffsetLoss
from loram.parallel import masters_
from loram.plan import pruned_size
from loram.train import TrainConfig, adamw, train, train_all_
from pipelines.shapes import SHAPES
from tests.counted import MODELS, SEMI, T, batch, make_models, seen


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def held(module, optimizer) -> int:
    """Bytes of all storages of a module and its optimiser, as they are before the first step."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [x for state in optimizer.state.values() for x in state.values()]
    for weight in module.parameters():
        if state := getattr(weight, "quant_state", None):
            tensors += [state.absmax, state.state2.absmax]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def trained(
    source: Path,
    what: AdapterConfig | DistilConfig | None,
    nf4: bool,
    rows: int,
    less: bool,
    offsets: int = 0,
) -> int:
    """The bytes of a step of two micro-batches in the training loop; None: plain alignment.

    Less what distillation reads: hidden states and top tokens of the large model.
    """
    model = load(source, nf4=nf4)
    if less:
        model.activation_checkpointing_enable({"use_reentrant": False})
    one = batch(rows, model.config.vocab_size)
    if isinstance(what, AdapterConfig):
        module = OffsetLoss(attach(model, what), list(range(1, offsets + 1)))
        shape = rows, offsets, T, model.config.hidden_size
        added = {f"offset_{name}": x for name, x in to_float8(torch.zeros(shape)).items()}
        one |= added if offsets else {}
    elif what:
        module = DistilLoss(train_all_(model), what)
        one |= {"target_ids": torch.zeros(rows, T, 8, dtype=torch.int64)}
        one |= {"target_log_probs": torch.full((rows, T, 8), -3.0)}
        one |= {"target_hidden": torch.ones(rows, 1, T, model.config.hidden_size)}
    else:
        module = CausalLoss(train_all_(model))
    config = TrainConfig(1, 1e-4, 2 * rows, T)
    optimizer = adamw(masters_(module), config)
    masks = {} if isinstance(what, AdapterConfig) else of_weights(model, source)
    before = held(module, optimizer) + sum(mask.nbytes for mask in masks.values())
    before += sum(tensor.nbytes for name, tensor in one.items() if "offset" in name)
    batches = [one] * 2
    return before + seen(
        lambda: list(train(module, batches, config, optimizer=optimizer, masks=masks))
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "kind",
    ["full", "full nf4", "stru", "stru nf4", "stru offsets"]
    + ["compressed", "compressed_nf4", "compressed masked", "compressed_nf4 masked"],
)
def test_sft(kind, family, rows, checkpointing, models):
    stored, *how = kind.split()
    source, adapter = models / family / stored, AdapterConfig(masked="masked" in how)
    offsets = read_config(source).num_hidden_layers if "offsets" in how else 0
    found = trained(source, adapter, "nf4" in how, rows, checkpointing, offsets)
    guess = sft_bytes(read_config(source), adapter, "nf4" in kind, rows, T, checkpointing, offsets)
    assert guess == pytest.approx(found, rel=0.15)


def test_sft_with_offsets_holds_those_of_a_micro_batch():
    config = SHAPES["llama2-13b"]
    asked = config, AdapterConfig(), True, 2, T, True
    values = to_float8(torch.zeros(2, 10, T, config.hidden_size)).values()
    held = sum(tensor.nbytes for tensor in values)
    assert sft_bytes(*asked, 10) - sft_bytes(*asked) == held


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["full", "stru", "stand_ins", "semi"])
def test_alignment(kind, family, rows, checkpointing, models):
    """By distillation where there are stand-ins."""
    source = models / family / kind
    what = DistilConfig(8, 1) if kind == "stand_ins" else None
    found = trained(source, what, False, rows, checkpointing)
    config = read_config(source)
    options = {"masked": pruned_size(config, SEMI).masked} if kind == "semi" else {}
    guess = align_bytes(config, rows, T, checkpointing, **options)
    assert guess == pytest.approx(found, rel=0.15)


def test_two_workers_share_what_is_trained():
    config = SHAPES["llama2-13b"]
    one, eight = (align_bytes(config, 1, 512, True, workers=n) for n in (1, 8))
    assert eight < one / 4
