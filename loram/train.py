"""The one training loop: alignment (all weights) and SFT (adapter only) differ in what is trained.

model = attach(load("small"), AdapterConfig())          # or train_all_(load("small"))
config = TrainConfig(steps=100, lr=1e-3, global_batch=32)
ids = order(packed.rows, config.steps * config.global_batch, config.seed)
for log in train(model, batches(packed, ids, 4), config):
    print(log.step, log.loss)
save_adapter(model, Path("adapter"))
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from loram.loss import Batch, CausalLoss, to_device
from loram.parallel import masters_, world


@dataclass(frozen=True)
class TrainConfig:
    """What is learnt, in the paper's settings for SFT; alignment has `lr=5e-5`.

    steps: optimiser steps. lr: peak of linear warm-up and cosine to 0. global_batch: rows a step,
    over all processes. seq_len: tokens a row. warmup_steps: at most half of `steps` is used.
    clip: largest norm of the gradient. eval_every: steps between held-out evaluations, at which
    also a checkpoint is written; these, and rows of seq_len, are the caller's to make. stop: end
    after that step of the schedule, which stays that of `steps`; None: at its end.
    """

    steps: int
    lr: float
    global_batch: int = 128
    seq_len: int = 512
    warmup_steps: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int = 50
    seed: int = 0
    stop: int | None = None

    @property
    def last(self) -> int:
        """The step after which training ends."""
        return self.steps if self.stop is None else self.stop


@dataclass(frozen=True)
class Log:
    """One optimiser step. step: steps done so far. loss: nats per trained token. grad_norm: before
    clipping. tokens: positions computed, padding included; trained_tokens: those with a loss; both
    over all processes. seconds: of the step. rows: packed rows that this process saw."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    rows: tuple[int, ...]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step number `step`, from 0: linear up to lr over the warm-up, then a cosine towards 0."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def train_all_(model: PreTrainedModel) -> PreTrainedModel:
    """Make every weight trainable except the output head: what alignment trains.

    Tied embeddings are that head and stay frozen: inference uses the original ones.
    """
    head = model.get_output_embeddings().weight
    for weight in model.parameters():
        weight.requires_grad_(weight is not head)
    return model


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trained weights, which become fp32 (`masters_`), its moments allocated at once
    so that they can be loaded."""
    weights = [w for w in masters_(module).parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    for w in weights:
        optimizer.state[w] = {
            "step": torch.zeros((), dtype=torch.float32, device=w.device),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
        }
    return optimizer


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
    masks: Mapping[nn.Parameter, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Log]:
    """Train in place; yields after every step, where the caller prints, evaluates or saves.

    Args:
        model: a causal LM or a `PeftModel`, or a `CausalLoss` already given to `replicate` or
            `shard`. What has `requires_grad` is trained, in fp32.
        batches: micro-batches, dicts of int64 `[b, T]` `input_ids`, `labels`, `position_ids` and
            int64 `[b]` `row`; as many rows a step as `global_batch` / processes, and no batch
            across two steps. After `start` steps it begins with the row that comes next.
        optimizer: from `adamw`, when its state was loaded.
        start: steps already done.
        masks: of weights that were pruned singly, bool and of their shape: what they have zeros
            for gets no gradient, so that neither clipping nor Adam's moments see it, and stays an
            exact zero.
        dtype: of the computation (autocast); float32 for exact comparisons.

    The global random state is set at every step, from the seed, the step and the process, so that
    dropout is the same after a resume and no random state has to be saved.

    Raises:
        ValueError: the batches end early or do not fit the global batch.
        FloatingPointError: loss or gradient is not finite; names the step.
    """
    module = CausalLoss(model) if hasattr(model, "get_output_embeddings") else model
    if optimizer is None:
        optimizer = adamw(module, config)
    weights = optimizer.param_groups[0]["params"]
    device = weights[0].device
    rank, size = world()
    share, extra = divmod(config.global_batch, size)
    if extra:
        raise ValueError(f"a global batch of {config.global_batch} over {size} processes")
    batches = iter(batches)
    for step in range(start, config.last):
        began = time.perf_counter()
        torch.manual_seed(_seed(config.seed, step, rank))
        module.train()
        rows: list[int] = []
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, trained, positions
        for batch, last in _micro_batches(batches, share):
            rows += batch["row"].tolist()
            totals[1] += int((batch["labels"][:, 1:] != -100).sum())
            totals[2] += batch["labels"].numel()
            with _synced(module, last):
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss = module(**to_device(batch, device))
                loss.backward()
            totals[0] += loss.detach()
        if size > 1:
            dist.all_reduce(totals)
        loss_sum, trained_tokens, tokens = totals.tolist()
        # Gradients are averages over processes of sums over tokens: make them means over tokens.
        per_token = 1 / max(trained_tokens, 1)
        for weight in weights:
            weight.grad.mul_(size * per_token)
            if masks and weight in masks:
                weight.grad.mul_(masks[weight])
        norm = torch.nn.utils.clip_grad_norm_(weights, config.clip)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        mean = loss_sum * per_token
        if not (math.isfinite(mean) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"step {step + 1}: loss {mean}, gradient norm {grad_norm}; a lower lr may help"
            )
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        yield Log(
            step + 1, mean, lr, grad_norm, int(tokens), int(trained_tokens), seconds, tuple(rows)
        )


def _micro_batches(batches: Iterator[Batch], rows: int) -> Iterator[tuple[Batch, bool]]:
    """The micro-batches of one step, each with whether it is the last."""
    seen = 0
    while seen < rows:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the batches ended after {seen} of {rows} rows of a step")
        seen += len(batch["row"])
        if seen > rows:
            raise ValueError(
                f"micro-batches of {len(batch['row'])} do not divide {rows} rows a step"
            )
        yield batch, seen == rows


def _seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _synced(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """DDP exchanges gradients with the last micro-batch only. FSDP2 does so every time: holding
    whole gradients between micro-batches would cost the memory that it is used to save."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
