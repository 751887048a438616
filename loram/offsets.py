"""Offsets: in training, put the small model's residual stream where the large one's is.

Let h_i be the residual stream of the large model after layer i, at some token of a training row,
and g_i that of the small model without an adapter. What was removed shows in h_i - g_i, which does
not change in training. It is found once for all tokens and added to the small model's stream after
layer i. Before its first step the small model so answers as the large one does, and from there on
its adapter has no cause to repair the small model: its gradients are those of the task. Recovery
knows nothing of it: the large model is where it should be.

Unlike a stand-in (`loram.compensate`) this is exact, and it is for these rows alone.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loram.by_row import ByRow, from_float8, to_float8, write_info
from loram.layers import Layers, Spool, walk
from loram.loss import Batch, CausalLoss
from loram.model import load
from loram.shards import link


@dataclass(frozen=True)
class OffsetConfig:
    """layers: after how many the stream is corrected, evenly, the last always one; 0 for none."""

    layers: int = 0


def offset_layers(count: int, config: OffsetConfig) -> list[int]:
    """The layers, numbered from 1, of `count`, after which the stream is corrected."""
    return sorted({round(count * (j + 1) / config.layers) for j in range(config.layers)})


def offset_bytes(config: PreTrainedConfig, offsets: OffsetConfig, positions: int) -> int:
    """What `write_offsets` will write for so many positions, but for the files' headers."""
    kept = len(offset_layers(config.num_hidden_layers, offsets))
    return positions * kept * (config.hidden_size + 4)


@torch.no_grad()
def write_offsets(
    source: str | Path,
    small: Path,
    out: Path,
    batches: Sequence[Batch],
    config: OffsetConfig,
    *,
    work: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Write the offsets of these rows to `out`, for `Offsets`.

    A position takes, for each layer, 4 bytes and one a value (float8 with a scale a position); the
    next offset makes up for what that rounds off. Peak memory: one layer of the large model in
    float32, then the small one as it is trained; the activations of one batch.

    Args:
        source: directory or hub id of the full model.
        small: directory of the model that is trained: pruned, aligned, quantised, packed.
        batches: dicts of int64 (batch, seq_len) and `row` (batch); all of one size but the last.
        work: where activations and finished offsets wait; after a crash a call with the same
            directory goes on at the layer it had reached.
        dtype: of the computation (autocast).

    Returns: bytes; tokens.

    Raises:
        ValueError: NaN or Inf came out of a layer of the large model (named).
    """
    layers, done = Layers(source, device=device), Spool(work / "done")
    spool, large = Spool(work / "activations"), Spool(work / "large")
    chosen = offset_layers(len(layers), config)
    mixed = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)
    with mixed:
        for i in walk(layers, list(batches), spool):
            if i in chosen:
                hidden = (spool.read(f"input-{i}", n) for n in range(len(batches)))
                large.write(f"{i}", (h.to(dtype) for h in hidden))
    del layers
    trained = load(small, dtype=dtype, device=device)
    done.write_several("offsets", _missing(trained, batches, chosen, large, mixed))
    write_info(work / "done", batches, chosen)
    shutil.copytree(work / "done", out, dirs_exist_ok=True, copy_function=link)
    spool.clear()
    large.clear()
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    return {"bytes": written, "tokens": sum(batch["input_ids"].numel() for batch in batches)}


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
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        for k, i in enumerate(layers):
            base.model.layers[i - 1].register_forward_hook(partial(self._add, k))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        **offsets: Tensor,
    ) -> Tensor:
        self._offsets = offsets  # until the next call: checkpointing runs layers in backward again
        return super().forward(input_ids, labels, position_ids)

    def _add(self, k: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self._offsets:
            return output
        kept = {name: self._offsets[f"offset_{name}"][:, k] for name in ("values", "scale")}
        return output + from_float8(kept).to(output)


def _missing(
    small: PreTrainedModel,
    batches: Sequence[Batch],
    chosen: list[int],
    large: Spool,
    mixed: torch.autocast,
) -> Iterator[Batch]:
    """Of each batch the offsets, as `to_float8` keeps them, (b, layers, T, ...)."""
    there: dict[int, Tensor] = {}
    found: list[Batch] = []

    def correct(i: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(to_float8(there[i].to(output) - output))
        return output + from_float8(found[-1]).to(output)  # as training adds it

    for i in chosen:
        small.model.layers[i - 1].register_forward_hook(partial(correct, i))
    small.eval()
    for number, batch in enumerate(batches):
        given = {name: batch[name].to(small.device) for name in ("input_ids", "position_ids")}
        there.update({i: large.read(f"{i}", number) for i in chosen})
        found.clear()
        with mixed:
            small.model(**given, use_cache=False)
        yield {key: torch.stack([kept[key] for kept in found], 1) for key in found[0]}
