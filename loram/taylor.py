"""First-order Taylor importance of KV groups and MLP neurons (LLM-Pruner's `param_first`).

The score of a group is the sum of abs(w * dL/dw) over all weights that leave with it: the rows of
k, v and of the group's query heads with the columns of o, or the gate row, up row and down column.
LLM-Pruner folds the scores of query heads {g, g + K, g + 2K, ...} onto KV head g; the query heads
that attend to KV head g are {g*n .. g*n + n - 1}, and those are scored here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from loram.loss import CausalLoss

FILE = "scores.safetensors"


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of every KV head (layers, kv_heads) and neuron (layers, neurons), float32.

    Computed once and cut at any ratio.
    """

    kv_heads: Tensor
    neurons: Tensor

    def save(self, directory: Path) -> None:
        """Write `scores.safetensors`."""
        save_file({"kv_heads": self.kv_heads, "neurons": self.neurons}, Path(directory) / FILE)

    @staticmethod
    def load(directory: Path) -> "Scores":
        """Read what `save` wrote."""
        return Scores(**load_file(Path(directory) / FILE))


def random_scores(config: PreTrainedConfig, seed: int) -> Scores:
    """Uniform random importance: cutting by it is the paper's Rand, in the same shapes as Stru."""
    generator = torch.Generator().manual_seed(seed)
    layers = config.num_hidden_layers
    return Scores(
        torch.rand(layers, config.num_key_value_heads, generator=generator),
        torch.rand(layers, config.intermediate_size, generator=generator),
    )


def taylor_scores(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Scores:
    """Scores of the full `model` from the gradient of the mean next-token loss over `batches`.

    Holds the gradients of the decoder's linears, in the dtype of the weights (float32 for the
    exact definition). Leaves the model without gradients.

    Args:
        batches: dicts of int64 (batch, seq_len): input_ids, labels, position_ids.

    Raises:
        ValueError: the batches hold no trained token, or the loss is not finite.
    """
    linears = [p for layer in model.model.layers for p in _weights(layer)]
    model.requires_grad_(False)
    for weight in linears:
        weight.requires_grad_(True)
    loss_of, tokens = CausalLoss(model.eval()), 0
    for batch in batches:
        loss = loss_of(batch["input_ids"], batch["labels"], batch["position_ids"])
        if not loss.isfinite():
            raise ValueError("the calibration loss is not finite: the weights hold NaN or Inf")
        loss.backward()
        tokens += int((batch["labels"][:, 1:] != -100).sum())  # the model shifts
    if not tokens:
        raise ValueError("the calibration rows hold no token to predict")
    kv_heads = model.config.num_key_value_heads
    with torch.no_grad():
        scores = [_layer_scores(layer, kv_heads, tokens) for layer in model.model.layers]
    for weight in linears:
        weight.grad = None
    model.requires_grad_(False)
    return Scores(torch.stack([s[0] for s in scores]), torch.stack([s[1] for s in scores]))


def _weights(layer: nn.Module) -> list[Tensor]:
    attn, mlp = layer.self_attn, layer.mlp
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    return [m.weight for m in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def _layer_scores(layer: nn.Module, kv_heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    q, k, v, o, gate, up, down = (
        (w.float() * w.grad.float()).abs_().div_(tokens) for w in _weights(layer)
    )

    def per_kv_head(x: Tensor) -> Tensor:
        # Rows (or columns) of a KV group are contiguous, so the leading axis splits by group.
        return x.reshape(kv_heads, -1).sum(1)

    heads = sum(per_kv_head(x.sum(1)) for x in (q, k, v)) + per_kv_head(o.sum(0))
    return heads.cpu(), (gate.sum(1) + up.sum(1) + down.sum(0)).cpu()
