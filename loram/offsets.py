"""Offsets: in training, put the small model's residual stream where the large one's is.

Let h_i be the residual stream of the large model after layer i, at some token of a training row,
and g_i that of the small model, with the offsets before it. The offset h_i - g_i is what was
removed since the offset before. It is found once for all tokens, kept in float8, and added to the
small model's stream after layer i. Before its first step the small model so ends where the large
one does (the final norm and the head are its own, which alignment may have changed), and its
adapter has no cause to repair it. Recovery knows nothing of offsets: the large model is where it
should be.

An adapter moves both models, and not alike. Training can stop part of the way, for the offsets of
the rows that are left to be found with the adapter as it is, on the small model and, recovered, on
the large one.

A stand-in (`loram.compensate`) comes near for any row; offsets are of these rows alone.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import open_adapted
from loram.by_row import ByRow, from_float8, has_rows, publish, to_float8, write_rows
from loram.errors import refuse
from loram.layers import HELD, Layers, Spool, in_parts, walk
from loram.loss import Batch, CausalLoss, unwrapped
from loram.merge import adapt_layer_
from loram.model import load
from loram.shards import finite


@dataclass(frozen=True)
class OffsetConfig:
    """every: the stream is corrected after each layer whose number this divides, and after the
    last; 1: after all; 0: after none.

    parts: in how many of equal length SFT is done; before each the offsets of its rows are found.
    """

    every: int = 0
    parts: int = 1

    def spans(self, steps: int) -> list[tuple[int, int]]:
        """Steps before each part of so many, and at its end."""
        parts = min(self.parts, steps)
        return list(pairwise(round(steps * j / parts) for j in range(parts + 1)))


def corrected(config: PreTrainedConfig, every: int) -> list[int]:
    """The layers, numbered from 1, after which a model of that config is corrected."""
    count = config.num_hidden_layers
    return [i for i in range(1, count + 1) if i % every == 0 or i == count] if every else []


def offset_bytes(config: PreTrainedConfig, every: int, positions: int) -> int:
    """What `write_offsets` will write for so many positions, but for the files' headers."""
    return positions * len(corrected(config, every)) * (config.hidden_size + 4)


def working_bytes(config: PreTrainedConfig, every: int, positions: int) -> int:
    """What its work directory holds beside that at most: of a part of the rows, the large model's
    residual stream at every place that is corrected, in bfloat16."""
    of_part = min(4 * config.hidden_size * positions, HELD)
    return len(corrected(config, every)) * of_part // 2


@torch.no_grad()
def write_offsets(
    source: str | Path,
    small: Path,
    out: Path,
    batches: Sequence[Batch],
    every: int,
    *,
    work: Path,
    adapters: tuple[Path, Path] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Write the offsets of these rows to `out`, for `Offsets`.

    A position takes, for each layer, 4 bytes and one a value (float8 with a scale a position); the
    next offset makes up for what that rounds off. Peak memory: one layer of the large model in
    float32, then the small one as it is trained; the activations of one batch. Off the device, the
    stream of a part of the rows, then the offsets of a batch three times.

    Args:
        source: directory or hub id of the full model.
        small: directory of the model that is trained: pruned, aligned, quantised, compressed.
        batches: dicts of int64 (batch, seq_len) and `row` (batch); all of one size but the last.
        every: as in `OffsetConfig`, at least 1.
        adapters: of the small model as it was trained so far, and the same recovered.
        work: where activations and finished offsets wait; after a crash the same call goes on at
            the part of the rows (`in_parts`) that it had reached. Emptied at the end.
        dtype: of the computation (autocast).

    Returns: bytes; tokens.

    Raises:
        UserError: after no layer.
        ValueError: NaN or Inf came out of a layer (named).
    """
    if not every:
        refuse("offset.every", 0, "1 or more")
    done, large = work / "done", Spool(work / "large")
    adapt = partial(adapt_layer_, adapters[1]) if adapters else None
    full = Layers(source, device=device, adapt=adapt)
    chosen = corrected(full.config, every)
    mixed = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    for part in in_parts(batches, full.config.hidden_size):
        if has_rows(done / "offsets", part):
            continue
        mine = [batches[n] for n in part]
        with mixed:
            _keep(full, mine, chosen, large, dtype)
        trained = _trained(small, adapters, dtype=dtype, device=device)
        for n, found in zip(part, _missing(trained, mine, chosen, large, mixed), strict=True):
            write_rows(done / "offsets", n, found)
        large.clear()
        del trained  # not to be in memory with a layer of the large one: in NF4 it is a cycle
        gc.collect()
    return publish(done, out, batches, chosen)


class Offsets(ByRow):
    """Offsets that `write_offsets` wrote, by row."""

    def fetch(self, rows: Tensor) -> Batch:
        """offset_values float8 (b, layers, T, hidden), offset_scale float32 (b, layers, T, 1).

        Raises:
            KeyError: a row that has none.
        """
        return {f"offset_{name}": kept for name, kept in self.read("offsets", rows).items()}


class OffsetLoss(CausalLoss):
    """`CausalLoss` that takes what `Offsets.fetch` gives and adds it to the residual stream after
    these layers, numbered from 1; without it is `CausalLoss`."""

    def __init__(self, model: PreTrainedModel | PeftModel, layers: list[int]) -> None:
        super().__init__(model)
        self._offsets: Batch = {}
        for k, i in enumerate(layers):
            unwrapped(model).model.layers[i - 1].register_forward_hook(partial(self._add, k))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        **offsets: Tensor,
    ) -> Tensor:
        """As `CausalLoss`; `offsets` as of `Offsets.fetch`, of the same rows."""
        self._offsets = offsets
        loss = super().forward(input_ids, labels, position_ids)
        self._offsets = {}
        return loss

    # Under gradient checkpointing it is called again on the way back, when there are none any more:
    # right, for what is added is a constant, of which nothing is kept for the backward pass.
    def _add(self, k: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self._offsets:
            return output
        kept = {name: self._offsets[f"offset_{name}"][:, k] for name in ("values", "scale")}
        return output + from_float8(kept).to(output)


def _trained(
    small: Path, adapters: tuple[Path, Path] | None, **options: Any
) -> PreTrainedModel | PeftModel:
    return open_adapted(small, adapters[0], **options) if adapters else load(small, **options)


def _keep(
    full: Layers, batches: Sequence[Batch], chosen: list[int], large: Spool, dtype: torch.dtype
) -> None:
    """The large model's residual stream after these layers, where `_missing` reads it."""
    for i, stream in walk(full, batches):
        if i in chosen:
            large.write(f"{i}", (hidden.to(dtype) for hidden in stream))


def _missing(
    small: PreTrainedModel | PeftModel,
    batches: Sequence[Batch],
    chosen: list[int],
    large: Spool,
    mixed: torch.autocast,
) -> Iterator[Batch]:
    """Of each batch the offsets, as `to_float8` keeps them, (b, layers, T, ...)."""
    found: list[Batch] = []

    def correct(i: int, number: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        finite(output, f"the output of layer {i - 1} of the small model")
        kept = to_float8(large.read(f"{i}", number).to(output) - output)
        found.append({name: tensor.cpu() for name, tensor in kept.items()})
        return output + from_float8(kept).to(output)  # as training adds it

    decoder = unwrapped(small.eval()).model
    points = [(i, decoder.layers[i - 1]) for i in chosen]
    for number, batch in enumerate(batches):
        hooks = [at.register_forward_hook(partial(correct, i, number)) for i, at in points]
        given = {name: batch[name].to(small.device) for name in ("input_ids", "position_ids")}
        found.clear()
        with mixed:
            decoder(**given, use_cache=False)
        for hook in hooks:
            hook.remove()
        yield {key: torch.stack([kept[key] for kept in found], 1) for key in found[0]}
