"""What pruning keeps: which rows or columns of every linear survive, and the way back.

The mask M of the paper (section 3) has 1 for a retained entry. The trained update lives on the
retained entries, so recovery puts it there and leaves exact zeros on the pruned ones. The paper's
recovery equation multiplies by (1 - M) instead; with its own convention for M that makes every
update zero, and its figures and its authors' code keep the retained entries, as is done here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from loram.errors import refuse

FILE = "kept.safetensors"
# The linears of a decoder layer: which dimension of the weight (out, in) is cut, and what its rows
# or columns belong to.
LINEARS = {
    "self_attn.q_proj": (0, "query heads"),
    "self_attn.k_proj": (0, "KV heads"),
    "self_attn.v_proj": (0, "KV heads"),
    "self_attn.o_proj": (1, "query heads"),
    "mlp.gate_proj": (0, "neurons"),
    "mlp.up_proj": (0, "neurons"),
    "mlp.down_proj": (1, "neurons"),
}


@dataclass(frozen=True, eq=False)
class Slice:
    """The surviving part of one matrix: `index` (int64, ascending) along `dim`, out of `size`.

    `nn.Linear.weight` is (out, in), `lora_B` (out, r) and `lora_A` (r, in), so a cut of the outputs
    is dim 0 of the weight and of lora_B, and a cut of the inputs is dim 1 of the weight and of
    lora_A: the same number serves the weight and the one factor that shares the cut dimension.
    """

    dim: int
    index: Tensor
    size: int

    def take(self, full: Tensor) -> Tensor:
        """Full to pruned; any dtype, any number of dimensions above `dim`."""
        return full.index_select(self.dim, self.index.to(full.device))

    def put(self, pruned: Tensor) -> Tensor:
        """Pruned to full, exact zeros where something was removed; `take(put(x)) == x`."""
        shape = list(pruned.shape)
        shape[self.dim] = self.size
        full = pruned.new_zeros(shape)
        return full.index_copy_(self.dim, self.index.to(pruned.device), pruned)


@dataclass(frozen=True, eq=False)
class Kept:
    """The surviving KV heads and MLP neurons of every decoder layer.

    `kv_heads[i]` and `neurons[i]` are int64, ascending. A KV head stays together with all of its
    query heads; a neuron is a gate row, an up row and a down column together.
    """

    kv_heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]

    def slices(self, config: PreTrainedConfig) -> dict[str, Slice]:
        """The `Slice` of each linear that was cut, by module name in the full model.

        Args:
            config: the config of the full model.
        """
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        sizes = widths(config, kv_heads, config.intermediate_size)
        slices = {}
        for i, (kept_kv, kept_neurons) in enumerate(zip(self.kv_heads, self.neurons, strict=True)):
            # Query heads g*n .. g*n+n-1 belong to KV head g: a head's rows are contiguous.
            queries = _spread(kept_kv, heads // kv_heads)
            kept = {
                "query heads": _spread(queries, head_dim(config)),
                "KV heads": _spread(kept_kv, head_dim(config)),
                "neurons": kept_neurons,
            }
            for name, (dim, what) in LINEARS.items():
                if len(kept[what]) < sizes[what]:
                    slices[f"model.layers.{i}.{name}"] = Slice(dim, kept[what], sizes[what])
        return slices

    @staticmethod
    def whole(config: PreTrainedConfig) -> "Kept":
        """Everything: what Semi and Unst keep, whose masks are elsewhere (`loram.masks`)."""
        layers = config.num_hidden_layers
        return Kept(
            (torch.arange(config.num_key_value_heads),) * layers,
            (torch.arange(config.intermediate_size),) * layers,
        )

    def save(self, directory: Path) -> None:
        """Write `kept.safetensors`: int64 `layers.<i>.kv_heads` and `layers.<i>.neurons`."""
        pairs = enumerate(zip(self.kv_heads, self.neurons, strict=True))
        save_file(
            {
                f"layers.{i}.{name}": tensor.clone()
                for i, (kv_heads, neurons) in pairs
                for name, tensor in (("kv_heads", kv_heads), ("neurons", neurons))
            },
            Path(directory) / FILE,
        )

    @staticmethod
    def load(directory: Path) -> "Kept":
        """Read what `save` wrote.

        Raises:
            UserError: nothing is there.
        """
        if not (Path(directory) / FILE).is_file():
            refuse("pruned", f"{directory} without {FILE}", "a pruned model directory")
        tensors = load_file(Path(directory) / FILE)
        layers = range(len(tensors) // 2)
        return Kept(
            tuple(tensors[f"layers.{i}.kv_heads"] for i in layers),
            tuple(tensors[f"layers.{i}.neurons"] for i in layers),
        )


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head; not every config states it."""
    stated = getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


def widths(config: PreTrainedConfig, kv_heads: int, neurons: int) -> dict[str, int]:
    """Rows or columns of each kind of `LINEARS` in a layer with so many KV heads and neurons."""
    rows = kv_heads * head_dim(config)
    group = config.num_attention_heads // config.num_key_value_heads
    return {"query heads": group * rows, "KV heads": rows, "neurons": neurons}


def _spread(index: Tensor, width: int) -> Tensor:
    """Indices of blocks of `width` to the indices of their elements: [2], 3 -> [6, 7, 8]."""
    return (index[:, None] * width + torch.arange(width)).flatten()
