"""Compensation: make the small model behave like the large one, in closed form, sub-block by
sub-block.

Let h be the residual stream of the large model and g that of the small one with all that was
compensated before; f a whole sub-block (attention or MLP), f_kept the cut one, x = norm(g) its
input. C is the ridge regression on x of what is missing, h + f(norm(h)) - g - f_kept(x), over the
calibration tokens; (x P) Q is the nearest to x C of rank k. It makes up for what was removed here
and for what is still missing from before; nothing is after a layer whose output training will put
right (`loram.offsets`). Kept weights are not touched.

The adapter then learns the task instead of repairing the small model. P and Q are dropped at
recovery: the large model does that part itself.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loram.errors import refuse
from loram.kept import Kept
from loram.layers import Layers, Spool
from loram.loss import Batch
from loram.masks import copy_masks, layer_masks
from loram.prune import copy_companions
from loram.pruned import compensated_config
from loram.ridge import Fit
from loram.shards import rewrite, write_index, write_part
from loram.stand_in import blocks_to_fill

KINDS = ("self_attn", "mlp")
NORMS = ("input_layernorm", "post_attention_layernorm")  # before each
REPORT = "missing.json"
DATA = ("corpus", "task", "both")


@dataclass(frozen=True)
class CompensateConfig:
    """rank: of each stand-in; 0 for no compensation.

    data: what it is fitted on: the general corpus, the task's own training rows, or half of each.
    rows: packed rows of it, or all if there are fewer.
    damping: share of the mean diagonal of X^T X that is added to it.
    """

    rank: int = 0
    data: str = "task"
    rows: int = 64
    damping: float = 1e-2


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
    second moments of one sub-block, and the activations of one batch; on disk, three times the
    residual stream in float32.

    Args:
        source: directory or hub id of the full model.
        pruned: directory of the small one, not packed and not quantised.
        batches: dicts of int64 (batch, seq_len): input_ids, labels, position_ids. What comes after
            the last label of a row counts as padding.
        offsets: layers, numbered from 1, after which offsets will put the residual stream right in
            training: what is missing before is then not missing behind.
        work: where activations wait; a call with the same directory after a crash goes on at the
            sub-block it had reached. Emptied at the end.
        dtype: of the computation (autocast).

    Returns: missing: share of what is missing in a sub-block that its stand-in leaves, the mean;
        tokens: fitted on.

    Raises:
        UserError: the model has stand-ins already.
        ValueError: no calibration tokens, or NaN or Inf came out of a layer (named).
    """
    if work is None:
        with TemporaryDirectory() as name:
            options: dict[str, Any] = {"work": Path(name), "device": device, "dtype": dtype}
            options["offsets"] = offsets
            return compensate(source, pruned, out, batches, config, **options)
    batches, out = list(batches), Path(out)
    tokens = sum(int(_real(batch).sum()) for batch in batches)
    if not tokens:
        raise ValueError("the calibration rows hold no token to predict")
    full, small = Layers(source, device=device), Layers(pruned, device=device)
    if getattr(small.config, "stand_ins", None):
        refuse("compensate", f"{pruned}, compensated already", "a pruned model")
    blocks, spool, done = _blocks(full, pruned), Spool(work / "activations"), work / "done"
    done.mkdir(parents=True, exist_ok=True)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        _fit(_Streams(full, small, batches, spool), blocks, config, offsets, done)
    out.mkdir(parents=True, exist_ok=True)
    for part in small.checkpoint.parts():
        names = small.checkpoint.names(part) or [part]
        write_part(out, part, {name: small.checkpoint.read(name) for name in names})
    for file in done.glob("*.safetensors"):
        (out / file.name).write_bytes(file.read_bytes())
    write_index(out)
    ranks = dict.fromkeys(blocks, min(config.rank, full.config.hidden_size))
    compensated_config(small.config, ranks).save_pretrained(out)
    copy_companions(small.checkpoint.path, out)
    copy_masks(small.checkpoint.path, out)
    spool.clear()
    missing = list(_read(done / REPORT).values())
    return {"missing": sum(missing) / max(len(missing), 1), "tokens": tokens}


class _Streams:
    """The residual streams of both models, `large-<n>` and `small-<n>` in the spool being what goes
    into sub-block number n: 0 is the first layer's attention, 1 its MLP."""

    def __init__(self, full: Layers, small: Layers, batches: list[Batch], spool: Spool) -> None:
        self.full, self.small, self.batches, self.spool = full, small, batches, spool
        self.device = full.device
        if "small-0" not in spool.names():
            spool.write("large-0", full.embedded(batches))
            spool.write("small-0", small.embedded(batches))

    def reached(self) -> int:
        """The sub-block to go on with."""
        there = [name.removeprefix("small-") for name in self.spool.names()]
        return max(int(number) for number in there if number.isdigit())

    def read(self, name: str, n: int) -> Tensor:
        return self.spool.read(name, n).to(self.device)

    def large(self, number: int, layer: nn.Module) -> Iterator[Tensor]:
        """The large stream after sub-block `number`."""
        for n, batch in enumerate(self.batches):
            h = self.read(f"large-{number}", n)
            yield h + _output(self.full, layer, number, h, batch)

    def kept(self, number: int, layer: nn.Module, fit: Fit | None) -> Iterator[Tensor]:
        """The small stream after it without a stand-in; tells `fit` what is missing."""
        for n, batch in enumerate(self.batches):
            g = self.read(f"small-{number}", n)
            after = g + _output(self.small, layer, number, g, batch)
            if fit:
                real = _real(batch).to(self.device)
                missing = self.read(f"large-{number + 1}", n) - after
                fit.add(_norm(layer, number)(g)[real], missing[real])
            yield after

    def compensated(self, number: int, layer: nn.Module, p: Tensor, q: Tensor) -> Iterator[Tensor]:
        """The small stream after it with the stand-in, from that without."""
        for n in range(len(self.batches)):
            x = _norm(layer, number)(self.read(f"small-{number}", n))
            yield self.read("kept", n) + x @ p.to(x) @ q.to(x)


def _fit(
    streams: _Streams,
    blocks: list[str],
    config: CompensateConfig,
    offsets: Collection[int],
    done: Path,
) -> None:
    """Both streams through all sub-blocks; the stand-ins of `blocks` into `done`."""
    spool, full, small = streams.spool, streams.full, streams.small
    reached = streams.reached()
    for number in range(reached, 2 * len(full)):
        i, after = number // 2, f"small-{number + 1}"
        if number == reached or number % 2 == 0:
            of_full, of_small = full.layer(i), small.layer(i)
        spool.write(f"large-{number + 1}", streams.large(number, of_full))
        name = f"model.layers.{i}.{KINDS[number % 2]}"
        if name in blocks:
            fit = Fit(full.config.hidden_size, full.device)
            spool.write("kept", streams.kept(number, of_small, fit))
            dtype = small.checkpoint.read(f"model.layers.{i}.{NORMS[number % 2]}.weight").dtype
            p, q = (x.to(dtype) for x in fit.solve(config.rank, config.damping))
            stored = {f"{name}.stand_in.P": p.cpu(), f"{name}.stand_in.Q": q.cpu()}
            write_part(done, name, stored)
            report = done / REPORT
            rewrite(report, json.dumps(_read(report) | {name: fit.left(p, q)}))
            # What follows sees them as they are kept.
            output = streams.compensated(number, of_small, p, q)
        else:
            output = streams.kept(number, of_small, None)
        if number % 2 and i + 1 in offsets:
            output = (streams.read(f"large-{number + 1}", n) for n in range(len(streams.batches)))
        spool.write(after, output)
        spool.drop(f"large-{number}")
        spool.drop(f"small-{number}")


def _norm(layer: nn.Module, number: int) -> nn.Module:
    return layer.get_submodule(NORMS[number % 2])


def _output(layers: Layers, layer: nn.Module, number: int, hidden: Tensor, batch: Batch) -> Tensor:
    """What a sub-block adds to the residual stream `hidden`."""
    x, i = _norm(layer, number)(hidden), number // 2
    if number % 2:
        output = layer.mlp(x)
    else:
        output = layer.self_attn(hidden_states=x, **layers.arguments(i, hidden, batch))[0]
    if not output.isfinite().all():
        name = f"model.layers.{i}.{KINDS[number % 2]}"
        raise ValueError(f"NaN or Inf in the weights or activations of {name}")
    return output


def _blocks(full: Layers, pruned: Path) -> list[str]:
    """The sub-blocks of every layer of which something was removed."""
    removed = set(Kept.load(pruned).slices(full.config))
    for i in range(len(full)):
        removed |= set(layer_masks(pruned, i))
    return blocks_to_fill(removed)


def _real(batch: Batch) -> Tensor:
    """Bool (batch, seq_len): up to the last label of each row."""
    return (batch["labels"] != -100).flip(1).int().cummax(1).values.flip(1).bool()


def _read(report: Path) -> dict[str, float]:
    return dict(json.loads(report.read_text())) if report.exists() else {}
