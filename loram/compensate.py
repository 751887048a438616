"""Compensation: make the small model behave like the large one, in closed form, sub-block by
sub-block.

Let h be the residual stream of the large model and g that of the small one with all that was
compensated so far; f a whole sub-block (attention or MLP), f_kept the cut one, x = norm(g) its
input. A stand-in (x P) Q beside f_kept makes up for what it misses over the calibration tokens: in
the stream (`loram.fit_values`), or in the gradient that comes back through it
(`loram.fit_gradients`), which is what counts where offsets put the stream right. Kept weights are
not touched.

The adapter then learns the task instead of repairing the small model. P and Q are dropped at
recovery: the large model does that part itself.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig

from loram.errors import refuse
from loram.fit_gradients import fit_gradients
from loram.fit_values import fit_values
from loram.kept import Kept
from loram.layers import Layers, Spool
from loram.loss import Batch, not_padding, trained_tokens
from loram.masks import copy_masks, layer_masks
from loram.pruned import compensated_config
from loram.shards import link, note, noted, write_part, write_rest
from loram.stand_in import blocks_to_fill
from loram.subblocks import SubBlocks

REPORT = "missing.json"
DATA = ("corpus", "task", "both")


@dataclass(frozen=True)
class CompensateConfig:
    """rank: of each stand-in; 0 for no compensation.

    data: what it is fitted on: the general corpus, the task's own training rows, or half of each.
    rows: packed rows of it, or all if there are fewer.
    damping: share of the mean diagonal of X^T X that is added to it, and with gradients of G^T G.
    gradients: fit what is missing in gradients, for training with offsets after every layer; else
        what is missing in the residual stream.
    """

    rank: int = 0
    data: str = "task"
    rows: int = 64
    damping: float = 1e-2
    gradients: bool = False


def working_bytes(config: PreTrainedConfig, gradients: bool, positions: int) -> int:
    """What the work directory holds at most, of so many positions: residual streams in float32."""
    streams = config.num_hidden_layers + 8 if gradients else 5
    return 4 * config.hidden_size * positions * streams


@torch.no_grad()
def compensate(
    source: str | Path,
    pruned: Path,
    out: Path,
    batches: Iterable[Batch],
    config: CompensateConfig,
    *,
    offsets: Collection[int] = (),
    work: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Write the pruned model with a stand-in in each sub-block of every cut layer to `out`.

    `out` becomes a model directory like `pruned`, with `model.layers.<i>.<block>.stand_in.P` and
    `.Q` beside its weights, in their dtype. Peak memory: one layer of each model in float32, the
    second moments of one sub-block, and the activations of one batch; with `config.gradients` also
    the output head. On disk: `working_bytes`.

    Args:
        source: directory or hub id of the full model.
        pruned: directory of the small one, as pruning left it: not aligned, compressed
            or quantised.
        batches: dicts of int64 (batch, seq_len): input_ids, labels, position_ids. What comes after
            the last label of a row counts as padding.
        offsets: layers, numbered from 1, after which offsets will put the residual stream right in
            training: stand-ins behind them need not make up for what was missing before them.
        work: where activations wait; after a crash the same call goes on at the sub-block it had
            reached. Emptied at the end.
        dtype: of the computation (autocast).

    Returns: missing: share of what is missing in a sub-block, with gradients of what is missing
        backward, that its stand-in leaves, the mean; tokens: fitted on.

    Raises:
        UserError: rank 0; the model has stand-ins already; gradients without offsets after every
            layer.
        ValueError: no calibration tokens, or NaN or Inf came out of a layer (named).
    """
    if work is None:
        with TemporaryDirectory() as name:
            options: dict[str, Any] = {"work": Path(name), "device": device, "dtype": dtype}
            options["offsets"] = offsets
            return compensate(source, pruned, out, batches, config, **options)
    if not config.rank:
        refuse("compensate.rank", 0, "1 or more")
    batches, out = list(batches), Path(out)
    tokens = sum(int(not_padding(batch).sum()) for batch in batches)
    trained_tokens(batches)  # there are some, or it raises
    full, small = Layers(source, device=device), Layers(pruned, device=device)
    if getattr(small.config, "stand_ins", None):
        refuse("compensate", f"{pruned}, compensated already", "a pruned model")
    count = len(full)
    if config.gradients and set(offsets) != set(range(1, count + 1)):
        refuse("compensate.gradients", f"true, offsets after {len(offsets)} layers", f"all {count}")
    blocks, spool, done = _blocks(full, pruned), Spool(work / "activations"), work / "done"
    done.mkdir(parents=True, exist_ok=True)
    report = done / REPORT
    given = SubBlocks(full), SubBlocks(small), batches, spool, blocks
    options = {"rank": config.rank, "damping": config.damping}
    # Cached casts of what gradients are taken at would hold all of it until the end.
    mixed = {"dtype": dtype, "enabled": dtype != torch.float32, "cache_enabled": False}
    with torch.autocast(device, **mixed):
        if config.gradients:
            found = fit_gradients(*given, **options)
        else:
            found = fit_values(*given, **options, offsets=offsets)
        for name, p, q, left in found:
            stored = {f"{name}.stand_in.P": p.cpu(), f"{name}.stand_in.Q": q.cpu()}
            write_part(done, name, stored)
            note(report, {name: left})
    out.mkdir(parents=True, exist_ok=True)
    for part in small.checkpoint.parts():
        write_part(out, part, small.checkpoint.tensors(part))
    for file in done.glob("*.safetensors"):
        link(file, out / file.name)
    ranks = dict.fromkeys(blocks, min(config.rank, full.config.hidden_size))
    write_rest(out, compensated_config(small.config, ranks), small.checkpoint.path)
    copy_masks(small.checkpoint.path, out)
    missing = list(noted(report).values())
    spool.clear()
    Spool(done).clear()
    return {"missing": sum(missing) / max(len(missing), 1), "tokens": tokens}


def _blocks(full: Layers, pruned: Path) -> list[str]:
    """The sub-blocks of every layer of which something was removed."""
    removed = set(Kept.load(pruned).slices(full.config))
    for i in range(len(full)):
        removed |= set(layer_masks(pruned, i))
    return blocks_to_fill(removed)
