"""Attention and MLP of a checkpoint one after the other, one decoder layer in memory at a time."""

import torch
from torch import Tensor, nn

from loram.layers import Layers
from loram.loss import Batch

KINDS = ("self_attn", "mlp")
NORMS = ("input_layernorm", "post_attention_layernorm")  # before each


class SubBlocks:
    """Sub-block number 0 is the first layer's attention, 1 its MLP, and so on. With h the residual
    stream (batch, seq_len, hidden) before it, it adds output(input(h)) to it."""

    def __init__(self, layers: Layers) -> None:
        self.layers, self.device = layers, layers.device
        self._loaded: tuple[int, nn.Module] | None = None

    def __len__(self) -> int:
        return 2 * len(self.layers)

    @staticmethod
    def name(number: int) -> str:
        """`model.layers.<i>.self_attn` or `.mlp`."""
        return f"model.layers.{number // 2}.{KINDS[number % 2]}"

    def dtype(self, number: int) -> torch.dtype:
        """Of the checkpoint there."""
        name = f"model.layers.{number // 2}.{NORMS[number % 2]}.weight"
        return self.layers.checkpoint.read(name).dtype

    def input(self, number: int, hidden: Tensor) -> Tensor:
        """norm(h)."""
        normed: Tensor = self._layer(number).get_submodule(NORMS[number % 2])(hidden)
        return normed

    def output(self, number: int, x: Tensor, batch: Batch) -> Tensor:
        """What the sub-block makes of norm(h).

        Raises:
            ValueError: NaN or Inf (the sub-block is named).
        """
        layer = self._layer(number)
        if number % 2:
            output: Tensor = layer.mlp(x)
        else:
            given = self.layers.arguments(number // 2, x.detach(), batch)
            output = layer.self_attn(hidden_states=x, **given)[0]
        if not output.isfinite().all():
            raise ValueError(f"NaN or Inf in the weights or activations of {self.name(number)}")
        return output

    def after(self, number: int, hidden: Tensor, batch: Batch) -> Tensor:
        """The residual stream behind it."""
        return hidden + self.output(number, self.input(number, hidden), batch)

    def vjp(self, number: int, x: Tensor, batch: Batch, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Its output, and the gradient at x of a gradient at the output: J^T gradient."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            output = self.output(number, x, batch)
        return output.detach(), torch.autograd.grad(output, x, gradient.to(output))[0]

    def _layer(self, number: int) -> nn.Module:
        i = number // 2
        if self._loaded is None or self._loaded[0] != i:
            self._loaded = None  # two layers are never held
            self._loaded = i, self.layers.layer(i)
        return self._loaded[1]
