"""First-order Taylor importance of KV groups and MLP neurons (LLM-Pruner's `param_first`).

The score of a group is the sum of abs(w * dL/dw) over all weights that leave with it: the rows of
k, v and of the group's query heads with the columns of o, or the gate row, up row and down column.
LLM-Pruner folds the scores of query heads {g, g + K, g + 2K, ...} onto KV head g; the query heads
that attend to KV head g are {g*n .. g*n + n - 1}, and those are scored here.

LLM-Pruner holds the whole model with all gradients. Here the backward pass goes layer by layer:
one layer with its gradients is in memory, the inputs of all layers wait on disk.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from loram.kept import LINEARS
from loram.layers import Layers, Spool, keep_inputs, loss_gradients
from loram.loss import Batch, trained_tokens

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


def taylor_scores(
    source: str | Path,
    batches: Iterable[Batch],
    *,
    work: Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """Scores of a full model from the gradient of the mean next-token loss over `batches`.

    Peak memory: one decoder layer in float32 twice (weights, gradients), or the output head, and
    the activations of one batch; on disk the inputs of all layers for all batches, in float32.

    Args:
        source: directory or hub id of the full model.
        batches: dicts of int64 (batch, seq_len): input_ids, labels, position_ids.
        work: where activations wait; a call with the same directory after a crash goes on at the
            layer it had reached. Emptied at the end.
        dtype: of the computation (autocast); float32 for the exact definition.

    Raises:
        ValueError: the batches hold no trained token, or NaN or Inf came out of a layer (named).
    """
    if work is None:
        with TemporaryDirectory() as directory:
            return taylor_scores(source, batches, work=Path(directory), device=device, dtype=dtype)
    batches = list(batches)
    tokens = trained_tokens(batches)
    layers, spool = Layers(source, device=device), Spool(work / "activations")
    # Cached casts of weights that have gradients would hold every layer until the last one is done.
    mixed = {"dtype": dtype, "enabled": dtype != torch.float32, "cache_enabled": False}
    with torch.autocast(device, **mixed):
        keep_inputs(layers, batches, spool)
        top = len(layers)
        if not {f"gradient-{top}", f"score-{top - 1}"} & spool.names():
            spool.write(f"gradient-{top}", loss_gradients(layers, batches, spool))
        for i in reversed(range(top)):
            if f"score-{i}" not in spool.names():
                found = _layer_gradients(layers, i, batches, spool, tokens)
                spool.write(f"score-{i}", found)
                spool.drop(f"gradient-{i + 1}")
    kv_heads = torch.stack([spool.read(f"score-{i}", 0) for i in range(top)])
    neurons = torch.stack([spool.read(f"score-{i}", 1) for i in range(top)])
    spool.clear()
    return Scores(kv_heads, neurons)


def _layer_gradients(
    layers: Layers, i: int, batches: list[Batch], spool: Spool, tokens: int
) -> tuple[Tensor, Tensor]:
    """Write `gradient-<i>`; the scores of layer `i`."""
    layer = layers.layer(i)
    for name in LINEARS:
        layer.get_submodule(name).weight.requires_grad_(True)

    def inputs() -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            hidden = spool.read(f"input-{i}", number).to(layers.device).requires_grad_(True)
            gradient = spool.read(f"gradient-{i + 1}", number).to(layers.device)
            layer(hidden, **layers.arguments(i, hidden.detach(), batch)).backward(gradient)
            assert hidden.grad is not None
            yield hidden.grad

    spool.write(f"gradient-{i}", inputs())
    with torch.no_grad():
        return _layer_scores(layer, layers.config.num_key_value_heads, tokens)


def _layer_scores(layer: nn.Module, kv_heads: int, tokens: int) -> tuple[Tensor, Tensor]:
    heads, neurons = torch.zeros(kv_heads), torch.zeros(layer.mlp.gate_proj.out_features)
    for name, (dim, what) in LINEARS.items():
        weight = layer.get_submodule(name).weight
        saliency = weight.grad.float().mul_(weight.float()).abs_().sum(1 - dim).div_(tokens).cpu()
        if what == "neurons":
            neurons += saliency
        else:
            # Rows (or columns) of a KV group are contiguous, so the axis splits by group.
            heads += saliency.reshape(kv_heads, -1).sum(1)
        weight.grad = None
    return heads, neurons
