"""One training step of the graph on Ray Train: rows in, checkpoints out, exact resume.

Every process runs `_work`. It reads its share of each global batch through Ray Data, and at each
evaluation reports a checkpoint; the best by held-out loss and the latest are kept. A lost process
restarts all from the latest; so does a later call with the same work directory. The rows of a
step depend on the seed, the step and the global batch alone, so both go on with the rows that
would have come.
"""

import json
import logging
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from torch import nn

from loram.adapter import CONFIG, WEIGHTS, AdapterConfig, attach, restrict_, save_adapter
from loram.distil import DistilConfig, DistilLoss, Targets, train_
from loram.errors import UserError, refuse
from loram.evaluate import perplexity
from loram.loss import CausalLoss
from loram.masks import copy_masks, of_weights
from loram.model import load, read_config, save
from loram.packing import Packed, batches, order
from loram.parallel import (
    load_state,
    load_weights,
    masters_,
    replicate,
    save_state,
    shard,
    world,
)
from loram.prune import copy_companions
from loram.train import Log, TrainConfig, adamw, train, train_all_
from pipelines.curve import append, go_on, summary
from pipelines.execute import CURVE
from pipelines.place import Place
from pipelines.step import Metrics
from pipelines.stream import stream

RUN = "run"  # Ray Train's directory under `work`
STATE = "state"  # what a training that was to stop leaves: a work directory to go on from
RETRIES = 2  # restarts after a lost or failed worker


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
    place: Place
    work: Path
    called: float  # Unix seconds


def fit(
    stage: Literal["align", "sft"],
    *,
    model: Path | str,
    train: Path,
    held_out: Path,
    config: TrainConfig,
    adapter: AdapterConfig | None,
    place: Place,
    out: Path,
    work: Path,
    distil: DistilConfig | None = None,
    targets: Path | None = None,
    kept: Path | None = None,
) -> Metrics:
    """Train on a Ray cluster and write the best model by held-out loss.

    Args:
        stage: `align` trains all weights but the head, divided over the workers (FSDP2); `out`
            becomes a model directory in bf16. `sft` trains `adapter` on a frozen model, 4-bit or
            not, copied to every worker (DDP); `out` becomes a PEFT adapter directory.
        model: directory or hub id of a full, pruned or NF4 model.
        train, held_out: packed rows.
        distil, targets: align by distillation, towards these targets of the rows in `train`.
        kept: of a pruned model, to train `adapter` on the full one at its positions alone.
        work: keeps checkpoints, `metrics.jsonl` (a line a step: loss, lr, grad_norm, tokens,
            tokens_per_second, peak_memory ...; a line an evaluation: held_out_loss) and
            `rows-<rank>.jsonl`, the rows each worker saw at each step.

    Returns:
        held_out_loss, best_step: of what was written; final_held_out_loss; tokens: without
        padding; trained_tokens; train_seconds: in steps; startup_seconds: from the call to the
        first step, after a lost worker to the first step after it; tokens_per_second;
        peak_memory_bytes: of worker 0, on the GPU or resident.

    Raises:
        UserError: a 4-bit model to align; loss or gradients that are not finite.
    """
    called = time.time()
    if stage == "align" and getattr(read_config(model), "quantization_config", None):
        refuse("align", f"a 4-bit model in {model}", "a model in 16 bits: quantise after alignment")
    work, out = Path(work).absolute(), Path(out)
    source = str(Path(model).absolute()) if Path(model).exists() else str(model)
    job = Job(
        stage,
        source,
        Packed(Path(train).absolute()),
        Packed(Path(held_out).absolute()),
        config,
        adapter,
        distil,
        targets and targets.absolute(),
        kept and kept.absolute(),
        place,
        work,
        called,
    )
    _drop_torn_snapshot(work / RUN)
    resources = {"CPU": place.cpus_per_worker, "GPU": place.gpus_per_worker}
    trainer = ray.train.torch.TorchTrainer(
        partial(_work, job),  # not `train_loop_config`: Ray's controller would import all this too
        scaling_config=ray.train.ScalingConfig(
            num_workers=place.workers,
            use_gpu=place.gpus_per_worker > 0,
            resources_per_worker={k: v for k, v in resources.items() if v},
        ),
        run_config=ray.train.RunConfig(
            name=RUN,
            storage_path=str(work),
            failure_config=ray.train.FailureConfig(max_failures=RETRIES),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1,  # beside the latest, which is always kept
                checkpoint_score_attribute="held_out_loss",
                checkpoint_score_order="min",
            ),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Ray Train leaves its own behind
    if "diverged" in result.return_value:
        raise UserError(f"{stage}: {result.return_value['diverged']}")
    best, scores = min(
        result.best_checkpoints, key=lambda kept: (kept[1]["held_out_loss"], kept[1]["step"])
    )
    _export(job, Path(best.path), out)
    if config.stop is not None:
        shutil.copytree(work, out / STATE)
    return summary(work / CURVE) | {
        "held_out_loss": scores["held_out_loss"],
        "best_step": scores["step"],
        "final_held_out_loss": result.metrics["held_out_loss"],
        "startup_seconds": result.return_value["startup_seconds"],
    }


def _work(job: Job) -> dict[str, Any]:
    """What every worker runs; the same collectives on each, in the same order."""
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
    start = load_state(Path(latest.path), module, optimizer) if latest else 0

    share = config.global_batch // size
    steps = order(job.train.rows, config.steps * config.global_batch, config.seed)
    ids = steps.reshape(config.steps, size, share)[start : config.last, rank]
    rows = stream(job.train, ids.ravel(), place.micro_batch)
    rows = chain(list(islice(rows, 1)), rows)  # waits until Ray Data has started
    if job.targets:
        targets = Targets(job.targets)
        rows = (batch | targets.fetch(batch["row"]) for batch in rows)
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
            held_out = perplexity(module, _held_out(job))["loss"]
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
        return replicate(CausalLoss(adapted)), adapted
    if job.distil:
        module = DistilLoss(train_(model, job.distil), job.distil)
    else:
        module = CausalLoss(train_all_(model))
    return (shard(module, device) if sharded else masters_(module)), model


def _held_out(job: Job) -> Any:
    """This worker's share of the held-out rows, in as many batches as every other worker's."""
    (rank, size), total = world(), job.held_out.rows
    share = -(-total // size)
    ids = np.arange(rank * share, (rank + 1) * share)
    for start, batch in enumerate(batches(job.held_out, ids % total, job.place.micro_batch)):
        first = start * job.place.micro_batch
        batch["labels"][ids[first : first + job.place.micro_batch] >= total] = -100
        yield batch


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


def _export(job: Job, checkpoint: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if job.stage == "align":
        model = load(job.model)
        load_weights(checkpoint, model)
        save(model, out)
        copy_companions(Path(job.model), out)
        return
    shutil.copyfile(checkpoint / "adapter" / WEIGHTS, out / WEIGHTS)
    config = json.loads((checkpoint / "adapter" / CONFIG).read_text())
    config |= {"base_model_name_or_path": job.model}
    copy_masks(checkpoint / "adapter", out)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _drop_torn_snapshot(run: Path) -> None:
    """Ray Train's list of checkpoints is not written atomically; half a one would end every run."""
    path = run / "checkpoint_manager_snapshot.json"
    try:
        json.loads(path.read_text() if path.exists() else "{}")
    except ValueError:
        path.unlink()
