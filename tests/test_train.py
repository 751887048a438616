"""The loss, the training loop and its checkpoints, without Ray."""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import FAMILIES, tiny_model
from rows import packed_rows

from loram import loss as loss_module
from loram.adapter import AdapterConfig, attach
from loram.errors import UserError
from loram.loss import CausalLoss, to_device
from loram.model import load, save
from loram.packing import batches, order
from loram.parallel import load_state, load_weights, masters_, replicate, save_state, shard
from loram.train import TrainConfig, adamw, learning_rate, train, train_all_

CONFIG = TrainConfig(steps=4, lr=1e-2, global_batch=8, seq_len=64, warmup_steps=2, seed=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    return packed_rows(tmp_path_factory.mktemp("packed") / "rows")


def ids_of(packed, config=CONFIG):
    return order(packed.rows, config.steps * config.global_batch, config.seed)


def run(model, packed, size=4, config=CONFIG, start=0, **options):
    ids = ids_of(packed, config)[start * config.global_batch :]
    return list(train(model, batches(packed, ids, size), config, start=start, **options))


def adapted(seed=0, **changes):
    return attach(tiny_model("llama"), AdapterConfig(**changes), seed)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["frozen", "trained", "tied"])
def test_loss_and_gradients_are_those_of_transformers(family, head, packed, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 37)  # several, the last incomplete
    model = tiny_model(family, tie_word_embeddings=head == "tied")
    if head == "frozen":
        train_all_(model)
    batch = to_device(next(batches(packed, np.arange(3), 3)), CPU)
    ours = CausalLoss(model)(**batch)
    ours.backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.requires_grad}
    model.zero_grad()
    # With its KV cache on, transformers would not keep the documents apart.
    theirs = model(**batch, use_cache=False).loss * (batch["labels"][:, 1:] != -100).sum()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert ("lm_head.weight" in gradients) == (head == "trained")
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-3)


def test_a_batch_without_labels_has_no_loss_and_no_gradient(packed):
    model = adapted()
    batch = to_device(next(batches(packed, np.arange(2), 2)), CPU)
    total = CausalLoss(model)(**(batch | {"labels": torch.full_like(batch["labels"], -100)}))
    total.backward()
    assert total.item() == 0
    trained = [w for w in model.parameters() if w.requires_grad]
    assert all(w.grad is not None and not w.grad.any() for w in trained)


def test_two_steps_equal_a_loop_written_out(packed):
    config = replace(CONFIG, steps=2, weight_decay=0.1, clip=0.5, warmup_steps=1)
    model, plain = train_all_(tiny_model("qwen2")), train_all_(tiny_model("qwen2"))
    logs = run(model, packed, config=config, dtype=torch.float32)

    weights = [w for w in plain.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.1, foreach=False)
    ids = ids_of(packed, config).reshape(2, 8)
    losses = []
    for step, lr in ((0, 1e-2), (1, 1e-2)):
        batch = to_device(next(batches(packed, ids[step], 8)), CPU)
        logits = plain(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [log.loss for log in logs] == pytest.approx(losses, rel=1e-5)
    assert all(log.grad_norm > 0.5 for log in logs)  # so that clipping did something
    for left, right in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_the_micro_batch_does_not_change_the_step(packed):
    config = replace(CONFIG, steps=1)
    one, four = (adapted(dropout=0.0) for _ in range(2))
    ones = run(one, packed, size=1, config=config, dtype=torch.float32)
    fours = run(four, packed, size=4, config=config, dtype=torch.float32)
    assert ones[0].loss == pytest.approx(fours[0].loss, rel=1e-6)
    assert ones[0].grad_norm == pytest.approx(fours[0].grad_norm, rel=1e-5)
    assert ones[0].rows == fours[0].rows == tuple(ids_of(packed, config))


def test_gradient_checkpointing_does_not_change_the_step(packed):
    config = replace(CONFIG, steps=2)
    plain, checkpointed = adapted(), tiny_model("llama")
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = attach(checkpointed, AdapterConfig())
    assert [log.loss for log in run(plain, packed, config=config)] == [
        log.loss for log in run(checkpointed, packed, config=config)
    ]
    assert_equal(weights_of(plain), weights_of(checkpointed))


def test_sft_leaves_the_base_as_it_was(packed):
    model = attach(tiny_model("llama").to(torch.bfloat16), AdapterConfig())
    before = weights_of(model)
    run(model, packed)
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    assert all(w.dtype == torch.float32 for n, w in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("tied", [True, False])
def test_alignment_trains_all_but_the_head(tied, packed):
    model = train_all_(tiny_model("qwen3", tie_word_embeddings=tied).to(torch.bfloat16))
    before = weights_of(model)
    run(model, packed)
    same = {n for n, w in model.named_parameters() if torch.equal(w, before[n])}
    assert same == {"model.embed_tokens.weight" if tied else "lm_head.weight"}


def test_what_is_trained_is_fp32_also_with_an_optimiser_of_ones_own(packed):
    model = train_all_(tiny_model("llama").to(torch.bfloat16))
    run(model, packed, optimizer=adamw(model, CONFIG))
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ["align", "sft"])
def test_a_resumed_run_is_bit_equal(kind, packed, tmp_path):
    def start():
        model = adapted() if kind == "sft" else train_all_(tiny_model("qwen2").to(torch.bfloat16))
        module = masters_(CausalLoss(model))
        return model, module, adamw(module, CONFIG)

    model, module, optimizer = start()
    logs = []
    for log in train(module, batches(packed, ids_of(packed), 4), CONFIG, optimizer=optimizer):
        logs.append(log)
        if log.step == 2:
            save_state(tmp_path / "state", module, optimizer, log.step)
            torch.rand(7)  # what the caller draws is of no consequence
    again, module, optimizer = start()
    assert load_state(tmp_path / "state", module, optimizer) == 2
    resumed = run(module, packed, start=2, optimizer=optimizer)
    assert [(log.step, log.loss, log.grad_norm, log.rows) for log in resumed] == [
        (log.step, log.loss, log.grad_norm, log.rows) for log in logs[2:]
    ]
    assert_equal(weights_of(model), weights_of(again))
    assert {f.suffix for f in (tmp_path / "state").iterdir()} == {".safetensors", ".json"}


def test_dropout_differs_by_step_and_seed(packed):
    config = replace(CONFIG, steps=2, lr=1e-12)
    ids = np.tile(np.arange(8), 2)  # the same rows twice, and next to no training between
    model = attach(tiny_model("llama"), AdapterConfig(dropout=0.5))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    losses = [
        [log.loss for log in train(copy.deepcopy(model), batches(packed, ids, 4), c)]
        for c in (config, config, replace(config, seed=4))
    ]
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 4


def test_learning_rate():
    config = replace(CONFIG, steps=400, lr=1.0, warmup_steps=100)
    rates = [learning_rate(config, step) for step in range(400)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1.0
    assert rates[250] == pytest.approx(0.5) and 0 < rates[399] < 1e-4
    assert sorted(rates[100:], reverse=True) == rates[100:]
    # Fewer steps than warm-up would never reach the peak: half of them are warm-up then.
    short = [learning_rate(replace(config, steps=10), step) for step in range(10)]
    assert short[4] == short[5] == 1.0
    assert [learning_rate(replace(config, steps=1), 0)] == [1.0]


def test_a_loss_that_is_not_finite_stops_with_its_step(packed):
    model = adapted()
    with pytest.raises(FloatingPointError, match="step 3: loss nan"):
        for log in train(model, batches(packed, ids_of(packed), 4), CONFIG):
            if log.step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)


def test_batches_that_do_not_fit_the_global_batch(packed):
    with pytest.raises(ValueError, match="ended after 4 of 8 rows"):
        list(train(adapted(), batches(packed, np.arange(12), 4), CONFIG))
    with pytest.raises(ValueError, match="micro-batches of 3 do not divide 8 rows"):
        run(adapted(), packed, size=3)


def test_a_quantised_model_is_not_sharded(tmp_path):
    save(tiny_model("llama"), tmp_path)
    with pytest.raises(UserError, match="sharding.*found a 4-bit model.*DDP"):
        shard(CausalLoss(load(tmp_path, nf4=True)), CPU)


def test_two_processes_do_what_one_does(packed, tmp_path):
    """DDP and FSDP2 on gloo: the same steps as one process, and checkpoints that one can read."""
    torch.multiprocessing.spawn(two, (packed, tmp_path), nprocs=2)
    model = adapted(dropout=0.0)
    alone = run(model, packed, size=1, dtype=torch.float32)
    together = torch.tensor([[log.loss, log.grad_norm] for log in alone])
    results = dict(np.load(tmp_path / "results.npz"))
    np.testing.assert_allclose(results["ddp"], together, rtol=1e-4)

    model = train_all_(tiny_model("qwen2", tie_word_embeddings=True).to(torch.bfloat16))
    alone = run(model, packed, size=1)
    np.testing.assert_allclose(results["fsdp"][:, 0], [log.loss for log in alone], rtol=5e-3)

    # What two processes divided, one continues, to rounding.
    model = train_all_(tiny_model("qwen2", tie_word_embeddings=True).to(torch.bfloat16))
    module = masters_(CausalLoss(model))
    optimizer = adamw(module, CONFIG)
    start = load_state(tmp_path / "fsdp", module, optimizer)
    exported = tiny_model("qwen2", tie_word_embeddings=True).to(torch.bfloat16)
    load_weights(tmp_path / "fsdp", exported)
    assert_equal({n: w.bfloat16() for n, w in weights_of(model).items()}, weights_of(exported))
    rest = run(module, packed, size=1, start=start, optimizer=optimizer)
    assert [log.loss for log in rest] == pytest.approx(list(results["fsdp"][2:, 0]), rel=5e-3)


def two(rank: int, packed, folder: Path) -> None:
    """What each of two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ids = ids_of(packed).reshape(CONFIG.steps, 2, 4)[:, rank].ravel()
    results = {}
    for kind in ("ddp", "fsdp"):
        if kind == "ddp":
            module, dtype = replicate(CausalLoss(adapted(dropout=0.0))), torch.float32
        else:
            model = train_all_(tiny_model("qwen2", tie_word_embeddings=True).to(torch.bfloat16))
            module, dtype = shard(CausalLoss(model), CPU), torch.bfloat16
        optimizer = adamw(module, CONFIG)
        results[kind] = []
        rows = batches(packed, ids, 1)
        for log in train(module, rows, CONFIG, optimizer=optimizer, dtype=dtype):
            results[kind].append([log.loss, log.grad_norm])
            if log.step == 2:
                save_state(folder / kind, module, optimizer, 2)
    if rank == 0:
        np.savez(folder / "results.npz", **{kind: np.array(v) for kind, v in results.items()})
    dist.destroy_process_group()
