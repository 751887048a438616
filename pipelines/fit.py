"""One training step of the graph on Ray Train: rows in, checkpoints out, exact resume.

Every process runs `worker.work`. The best checkpoint by held-out loss and the latest are kept. A
lost process restarts all from the latest; so does a later call with the same work directory. The
rows of a step depend on the seed, the step and the global batch alone, so both go on with the rows
that would have come.
"""

import json
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Literal

import ray.train
import ray.train.torch

from loram.adapter import AdapterConfig
from loram.adapter_files import CONFIG, WEIGHTS, named
from loram.distil import DistilConfig
from loram.errors import UserError, refuse
from loram.masks import copy_masks
from loram.model import load, read_config, save
from loram.packing import Packed
from loram.parallel import load_weights
from loram.shards import copy_companions
from loram.train import TrainConfig
from pipelines import worker
from pipelines.curve import summary
from pipelines.execute import CURVE
from pipelines.lock import wait_lock
from pipelines.place import Place
from pipelines.step import Metrics
from pipelines.worker import RUN, TRAINING, Job

STATE = "state"  # what a training that was to stop leaves: a work directory to go on from
RETRIES = 2  # restarts after a lost or failed worker


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
    offsets: Path | None = None,
    earlier: Path | None = None,
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
        offsets: directory with those of `train` and `held_out`, for a small model in `sft`; losses
            are then near those of the large model.
        earlier: what a training of the same that was to stop left. This one goes on from there,
            and of its own checkpoints writes the best: with other offsets losses do not compare.
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
        offsets and offsets.absolute(),
        earlier and latest_checkpoint(earlier.absolute()),
        place,
        work,
        called,
    )
    wait_lock(work / TRAINING).release()  # a killed driver's workers may outlive it for a while
    _drop_torn_snapshot(work / RUN)
    if earlier and not (work / RUN).exists():
        work.mkdir(parents=True, exist_ok=True)
        for file in (earlier / STATE).glob("*.jsonl"):
            shutil.copy(file, work)
    resources = {"CPU": place.cpus_per_worker, "GPU": place.gpus_per_worker}
    trainer = ray.train.torch.TorchTrainer(
        # Not `train_loop_config`: Ray's controller would import all this, too.
        partial(worker.work, job),
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
        shutil.copytree(work, out / STATE, ignore=shutil.ignore_patterns("*.lock"))
    return summary(work / CURVE) | {
        "held_out_loss": scores["held_out_loss"],
        "best_step": scores["step"],
        "final_held_out_loss": result.metrics["held_out_loss"],
        "startup_seconds": result.return_value["startup_seconds"],
    }


def latest_checkpoint(stopped: Path) -> Path:
    """Where a training stopped, with its `adapter`; what it wrote is its best."""
    return max((stopped / STATE / RUN).glob("step-*"))


def _export(job: Job, checkpoint: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if job.stage == "align":
        model = load(job.model)
        load_weights(checkpoint, model)
        save(model, out)
        copy_companions(Path(job.model), out)
        copy_masks(job.model, out)
        return
    shutil.copyfile(checkpoint / "adapter" / WEIGHTS, out / WEIGHTS)
    config = json.loads((checkpoint / "adapter" / CONFIG).read_text())
    config |= named(job.model)
    copy_masks(checkpoint / "adapter", out)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _drop_torn_snapshot(run: Path) -> None:
    """Ray Train's list of checkpoints is not written atomically; half a one would end every run."""
    path = run / "checkpoint_manager_snapshot.json"
    try:
        json.loads(path.read_text() if path.exists() else "{}")
    except ValueError:
        path.unlink()
