"""What every worker of a training runs: its share of each global batch through Ray Data, the loop
of `loram.train`, and at each evaluation a report to Ray Train with a checkpoint."""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from torch import nn

from loram.adapter import AdapterConfig, attach, restrict_, save_adapter
from loram.distil import DistilConfig, DistilLoss, Targets
from loram.evaluate import perplexity
from loram.loss import CausalLoss
from loram.masks import of_weights
from loram.model import load
from loram.offsets import OffsetLoss, Offsets
from loram.packing import Packed, batches, order
from loram.parallel import load_state, masters_, replicate, save_state, shard, world
from loram.train import Log, TrainConfig, adamw, train, train_all_
from pipelines.curve import append, go_on
from pipelines.execute import CURVE
from pipelines.lock import wait_lock
from pipelines.place import Place, forget_peak
from pipelines.stream import stream

RUN = "run"  # Ray Train's directory under the work directory
TRAINING = "training.lock"  # there, held by the first worker: two trainings never write the same


@dataclass(frozen=True)
class Job:
    """The arguments of `fit` for the workers; paths absolute: Ray changes their directory."""

    stage: Literal["align", "sft"]
    model: str
    train: Packed
    held_out: Packed
    config: TrainConfig
    adapter: AdapterConfig | None
    distil: DistilConfig | None
    targets: Path | None
    kept: Path | None
    offsets: Path | None
    earlier: Path | None
    place: Place
    work: Path
    called: float  # Unix seconds


def work(job: Job) -> dict[str, Any]:
    """Train; the same collectives on every worker, in the same order.

    Returns: `startup_seconds`, from the call of `fit` to the first step; or `diverged`, why.
    """
    with wait_lock(job.work / TRAINING) if world()[0] == 0 else nullcontext():
        return _work(job)


def _work(job: Job) -> dict[str, Any]:
    forget_peak()
    rank, size = world()
    config, place, run = job.config, job.place, job.work / RUN
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(place.cpus_per_worker)
    module, model = _build(job, device)
    masks = of_weights(model, job.model) if job.stage == "align" else None
    if job.kept:
        masks = restrict_(model, job.kept)
    optimizer = adamw(module, config)
    latest = ray.train.get_checkpoint()
    begin = Path(latest.path) if latest else job.earlier
    start = load_state(begin, module, optimizer) if begin else 0

    share = config.global_batch // size
    steps = order(job.train.rows, config.steps * config.global_batch, config.seed)
    ids = steps.reshape(config.steps, size, share)[start : config.last, rank]
    rows = stream(job.train, ids.ravel(), place.micro_batch)
    rows = chain(list(islice(rows, 1)), rows)  # waits until Ray Data has started
    more: Targets | Offsets | None = Targets(job.targets) if job.targets else None
    if job.offsets:
        more = Offsets(job.offsets / "train")
    if more:
        rows = (batch | more.fetch(batch["row"]) for batch in rows)
    seen = go_on(job.work / f"rows-{rank}.jsonl", start)
    curve = go_on(job.work / CURVE, start) if rank == 0 else None
    started = time.time()
    try:
        for log in train(module, rows, config, optimizer=optimizer, start=start, masks=masks):
            if log.rows != tuple(ids[log.step - 1 - start]):
                raise RuntimeError(f"step {log.step}: other rows arrived than were asked for")
            append(seen, {"step": log.step, "workers": size, "rows": log.rows})
            append(curve, _line(job, log))
            if log.step % config.eval_every and log.step < config.last:
                continue
            try:
                held_out = perplexity(module, _held_out(job))["loss"]
            except FloatingPointError as error:
                raise FloatingPointError(f"after step {log.step}: {error}") from None
            append(curve, {"step": log.step, "time": time.time(), "held_out_loss": held_out})
            path = run / f"step-{log.step:06d}"
            save_state(path, module, optimizer, log.step)
            if job.stage == "sft" and rank == 0:
                save_adapter(model, path / "adapter")
            ray.train.report(
                {"step": log.step, "held_out_loss": held_out},
                checkpoint=ray.train.Checkpoint(path),
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,  # it is in its place
            )
    except FloatingPointError as error:
        return {"diverged": str(error)}  # on every worker alike; another attempt would not help
    return {"startup_seconds": started - job.called}


def _build(job: Job, device: torch.device) -> tuple[nn.Module, Any]:
    """The module to train, and the model in it."""
    sharded = job.stage == "align" and world()[1] > 1
    # Sharding moves the weights to the device layer by layer.
    model = load(job.model, device="cpu" if sharded else str(device))
    if job.place.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if job.stage == "sft":
        assert job.adapter
        adapted = attach(model, job.adapter, job.config.seed)
        corrected = Offsets(job.offsets / "train").layers if job.offsets else []
        return replicate(OffsetLoss(adapted, corrected)), adapted
    if job.distil:
        module = DistilLoss(train_all_(model), job.distil)
    else:
        module = CausalLoss(train_all_(model))
    return (shard(module, device) if sharded else masters_(module)), model


def _held_out(job: Job) -> Any:
    """This worker's share of the held-out rows, in as many batches as every other worker's."""
    (rank, size), total = world(), job.held_out.rows
    offsets = Offsets(job.offsets / "held_out") if job.offsets else None
    share = -(-total // size)
    ids = np.arange(rank * share, (rank + 1) * share)
    for start, batch in enumerate(batches(job.held_out, ids % total, job.place.micro_batch)):
        first = start * job.place.micro_batch
        batch["labels"][ids[first : first + job.place.micro_batch] >= total] = -100
        yield batch | (offsets.fetch(batch["row"]) if offsets else {})


def _line(job: Job, log: Log) -> dict[str, float]:
    tokens = log.tokens * (1 - job.train.info["padding"])
    return {
        "step": log.step,
        "time": time.time(),
        "loss": log.loss,
        "lr": log.lr,
        "grad_norm": log.grad_norm,
        "tokens": round(tokens),
        "trained_tokens": log.trained_tokens,
        "seconds": log.seconds,
        "tokens_per_second": tokens / log.seconds,
        "peak_memory": job.place.peak_memory(),
    }
