"""Alignment by distillation: the small model learns to answer as the large one did.

The large model's targets are computed once, a layer at a time, and wait on disk: of each position
the likeliest next tokens with their log-probabilities, and hidden states between the layers. Beside
`loram.train` this needs no large model; the paper's alignment is next-token loss instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from loram.by_row import ByRow, from_float8, has_rows, publish, to_float8, write_rows
from loram.layers import Layers, in_parts, walk
from loram.loss import CHUNK, Batch, CausalLoss


@dataclass(frozen=True)
class DistilConfig:
    """top: next tokens kept of each position; 0 for no distillation. hidden_layers: hidden states
    kept of each position, evenly between the layers. hidden_weight: of their loss beside that of
    the next token."""

    top: int = 0
    hidden_layers: int = 3
    hidden_weight: float = 1.0


@torch.no_grad()
def write_targets(
    source: str | Path,
    out: Path,
    batches: Sequence[Batch],
    config: DistilConfig,
    *,
    work: Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Write what the large model makes of these rows to `out`, for `Targets`.

    A position takes 6 bytes for each of `top` and, for each hidden state, 4 and a byte a value
    (float8 with a scale a position). Peak memory: one layer or the head in float32, the activations
    of one batch, and the logits of 1,024 positions; off the device, the stream of a part of the
    rows.

    Args:
        source: directory or hub id of the full model.
        batches: dicts of int64 (batch, seq_len) and `row` (batch); all of one size but the last.
        work: where finished targets wait; after a crash the same call goes on at the part of the
            rows (`in_parts`) that it had reached. Emptied at the end.
        dtype: of the computation (autocast).

    Returns: bytes; tokens.

    Raises:
        ValueError: NaN or Inf came out of a layer (named).
    """
    layers, done = Layers(source, device=device), work / "done"
    chosen = hidden_layers(len(layers), config)
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        for part in in_parts(batches, layers.config.hidden_size):
            if has_rows(done / "top", part):
                continue
            _write_part(layers, batches, part, chosen, config.top, done)
    return publish(done, out, batches, chosen)


def _write_part(
    layers: Layers,
    batches: Sequence[Batch],
    part: range,
    chosen: list[int],
    top: int,
    done: Path,
) -> None:
    """The targets of some batches, those of the last layer at the end."""
    for i, stream in walk(layers, [batches[n] for n in part]):
        if i in chosen:
            for n, hidden in zip(part, stream, strict=True):
                write_rows(done / f"hidden-{i}", n, to_float8(hidden))
    norm, head = layers.head()
    for n, hidden in zip(part, stream, strict=True):
        likeliest = top_tokens(head, norm(hidden.to(layers.device)), top)
        write_rows(done / "top", n, likeliest)


def hidden_layers(count: int, config: DistilConfig) -> list[int]:
    """The layers whose inputs are kept, of `count`; the first's, the embeddings, never is one."""
    parts = config.hidden_layers + 1
    return sorted({round(count * j / parts) for j in range(1, parts)} - {0, count})


def target_bytes(config: PreTrainedConfig, distil: DistilConfig, positions: int) -> int:
    """What `write_targets` will write for so many positions, but for the files' headers."""
    kept = len(hidden_layers(config.num_hidden_layers, distil))
    return positions * (6 * distil.top + kept * (config.hidden_size + 4))


class Targets(ByRow):
    """Targets that `write_targets` wrote, by row."""

    def fetch(self, rows: Tensor) -> Batch:
        """target_ids int64 (b, T, top); target_log_probs float32 (b, T, top); target_hidden bf16
        (b, kept layers, T, hidden).

        Raises:
            KeyError: a row that has no targets.
        """
        hidden = [from_float8(self.read(f"hidden-{i}", rows)) for i in self.layers]
        top = self.read("top", rows)
        found = {
            "target_ids": top["ids"].long(),
            "target_log_probs": top["log_probs"].float(),
        }
        return found | ({"target_hidden": torch.stack(hidden, 1).bfloat16()} if hidden else {})


class DistilLoss(CausalLoss):
    """`CausalLoss` that, given targets, sums over the same positions instead: the divergence from
    the large model's next-token distribution, all tokens outside its top counted as one, and
    `hidden_weight` times the mean over kept layers of |g - h|^2 / |h|^2 of the hidden states."""

    def __init__(self, model: PreTrainedModel, config: DistilConfig) -> None:
        super().__init__(model)
        self.weight = config.hidden_weight
        self.hidden = hidden_layers(len(model.model.layers), config)

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, **targets: Any
    ) -> Tensor:
        """As `CausalLoss`; `targets` as of `Targets.fetch`, of the same rows."""
        if not targets:
            return super().forward(input_ids, labels, position_ids)
        out = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            output_hidden_states=True,
        )
        trained = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        head = self.model.get_output_embeddings()
        parts = zip(
            *(
                x[trained].split(CHUNK)
                for x in (out.last_hidden_state, targets["target_ids"], targets["target_log_probs"])
            ),
            strict=True,
        )
        losses = [checkpoint(_divergence, head, *part, use_reentrant=False) for part in parts]
        total = torch.stack(losses).sum()
        for n, i in enumerate(self.hidden):
            large = targets["target_hidden"][:, n][trained].float()
            apart = (out.hidden_states[i][trained].float() - large).square().sum(-1)
            near = (apart / large.square().sum(-1).clamp_min(1e-6)).sum()
            total = total + self.weight / len(self.hidden) * near
        return total


def _divergence(head: nn.Module, hidden: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Summed over positions: sum of p (log p - log q) over the top tokens and over the rest."""
    found = head(hidden).float().log_softmax(-1).gather(1, ids)

    def with_rest(top: Tensor) -> Tensor:
        rest = (1 - top.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
        return torch.cat([top, rest], -1)

    p, q = with_rest(log_probs), with_rest(found)
    return (p.exp() * (p - q)).sum()


def top_tokens(head: nn.Module, hidden: Tensor, count: int) -> Batch:
    """The likeliest tokens after each of the normed states (b, T, hidden): `log_probs`, float16,
    and `ids`, int32, (b, T, count)."""
    found: Iterator[Any] = (
        head(part).float().log_softmax(-1).topk(count) for part in hidden.flatten(0, 1).split(CHUNK)
    )
    values, ids = zip(*((top.values, top.indices.int()) for top in found), strict=True)
    shape = (*hidden.shape[:2], count)
    return {"log_probs": torch.cat(values).half().view(shape), "ids": torch.cat(ids).view(shape)}
