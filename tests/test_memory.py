"""Estimated peaks of training against the tensor bytes that torch's profiler sees."""

import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from loram.adapter import AdapterConfig, attach
from loram.by_row import to_float8
from loram.compensate import CompensateConfig, compensate
from loram.distil import DistilConfig, DistilLoss
from loram.loss import CausalLoss
from loram.masks import of_weights
from loram.memory import align_bytes, compensate_bytes, prune_bytes, sft_bytes
from loram.model import load, read_config, save
from loram.offsets import OffsetLoss
from loram.parallel import masters_
from loram.plan import pruned_size
from loram.prune import PruneConfig, choose, prune
from loram.sparse import pack, sparsify
from loram.taylor import random_scores, taylor_scores
from loram.train import TrainConfig, adamw, train, train_all_
from pipelines.shapes import SHAPES
from tests.conftest import tiny_model

SEMI, T = PruneConfig("semi"), 128
CUT = PruneConfig("stru", 0.5, keep_first=1, keep_last=1)
# A deep one with a large vocabulary and biases, a wide one whose head is tied to its embeddings.
MODELS = {
    "qwen2": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5}
    | {"vocab_size": 4096, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    | {"vocab_size": 2048, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Each family full, cut in its inner layers, with stand-ins, pruned by SparseGPT and packed."""
    root = tmp_path_factory.mktemp("models")
    for family, shape in MODELS.items():
        where = root / family
        save(tiny_model(family, max_position_embeddings=512, **shape).bfloat16(), where / "full")
        config = read_config(where / "full")
        cut = where / "full", where / "stru"
        prune(*cut, choose(random_scores(config, 0), config, CUT))
        fitted = CompensateConfig(rank=16)
        compensate(*cut, where / "stand_ins", [batch(2, 2048)], fitted)
        sparsify(where / "full", where / "semi", [batch(2, 2048)], SEMI)
        pack(where / "semi", where / "packed", nf4=False)
        pack(where / "semi", where / "packed_nf4", nf4=True)
    return root


def batch(rows: int, vocab: int) -> dict[str, torch.Tensor]:
    """Rows of two documents each."""
    ids = torch.randint(3, vocab, (rows, T), generator=torch.Generator().manual_seed(rows))
    positions = torch.arange(T // 2).repeat(rows, 2)
    row = torch.arange(rows)
    return {"input_ids": ids, "labels": ids, "position_ids": positions, "row": row}


def seen(run) -> int:
    """The largest sum of bytes that were allocated and not yet freed."""
    gc.collect()  # or what it frees half-way counts as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


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
    + ["packed", "packed_nf4", "packed masked"],
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


@pytest.mark.parametrize("method", ["stru", "semi"])
@pytest.mark.parametrize("family", MODELS)
def test_pruning(method, family, models, tmp_path):
    source = models / family / "full"
    rows = [batch(4, 2048)] * 2
    config = PruneConfig(method)
    if method == "stru":
        found = seen(lambda: taylor_scores(source, rows, dtype=torch.bfloat16))
    else:
        found = seen(lambda: sparsify(source, tmp_path / "out", rows, config))
    # A mapped file counts as allocated, although its pages are the file's.
    found -= sum(file.stat().st_size for file in source.glob("model*.safetensors"))
    assert prune_bytes(read_config(source), config, 4, T) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_compensation(family, gradients, models, tmp_path):
    """In as little memory after many sub-blocks as after one."""
    source, pruned = models / family / "full", models / family / "stru"
    config, layers = read_config(source), range(1, read_config(source).num_hidden_layers + 1)
    options = {"offsets": layers, "dtype": torch.bfloat16, "work": tmp_path / "work"}
    fitted = [batch(4, 2048)] * 4, CompensateConfig(8, gradients=gradients)
    found = seen(lambda: compensate(source, pruned, tmp_path / "out", *fitted, **options))
    for model in (source, pruned):  # mapped files
        found -= sum(file.stat().st_size for file in model.glob("model*.safetensors"))
    assert compensate_bytes(config, 4, T, gradients) == pytest.approx(found, rel=0.25)


def test_two_workers_share_what_is_trained():
    config = SHAPES["llama2-13b"]
    one, eight = (align_bytes(config, 1, 512, True, workers=n) for n in (1, 8))
    assert eight < one / 4
