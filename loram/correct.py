"""Correction of an adapter for weights that differ between training and inference.

An adapter that was trained beside changed weights (aligned, moved by SparseGPT, rounded to NF4)
also learnt to live with the change. EMLoC (arXiv 2506.12015) takes it back without training. In the
paper's convention, A (in, r) and B (r, out): with A = U S V^T, A' = U and B' = S V^T B are the same
update; what x sees of the change through U is C = U^T (W_full - W_small). The update is s A' B', so
B' - C / s does at inference what the adapter did in training, for every x in the span of U. Each
row of C / s is limited to 3 times the mean size of the row of B' that it is taken from.

Where a weight was not changed nothing happens. What was removed is no change: the full model
brings it back, and the adapter is zero there.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from loram.kept import Slice
from loram.masks import layer_masks, unpacked
from loram.model import read_config
from loram.packed import PackedLinear
from loram.shards import Checkpoint

LIMIT = 3.0


class Changes:
    """The changes of every decoder linear's kept weights, read one matrix at a time.

    Args:
        base: directory or hub id of the full model.
        small: directory of the model that the adapter was trained on: 16-bit, NF4 or packed.
        slices: of what was cut, by module name.
    """

    def __init__(self, base: str | Path, small: Path, slices: dict[str, Slice]) -> None:
        self.full, self.small = Checkpoint(base), Checkpoint(small)
        self.config, self.slices = read_config(small), slices

    def of(self, module: str) -> Tensor | None:
        """W_full - W_small in the small model's shape, float32 (out, in), zeros where a single
        weight was pruned; None where nothing changed."""
        if ".layers." not in module:
            return None
        stored = {
            name.removeprefix(f"{module}."): self.small.read(name)
            for name in self.small.names(module)
        }
        full, small = self.full.read(f"{module}.weight"), self._held(module, stored)
        if module in self.slices:
            full = self.slices[module].take(full)
        change = full.float() - small.float()
        masks = layer_masks(self.small.path, int(module.split(".")[2]))
        bits = stored.get("bits", masks.get(module))
        if bits is not None:
            change *= unpacked(bits, change.shape[1])
        return change if change.any() else None

    def _held(self, module: str, stored: dict[str, Tensor]) -> Tensor:
        """The dense weight that the small model computes with, of the module's tensors."""
        weight = stored.get("weight")
        if weight is None:
            rows, width = len(stored["bits"]), self.full.read(f"{module}.weight").shape[1]
            count, nf4 = self.config.survivors[module], self.config.survivors_nf4
            packed = PackedLinear(width, rows, False, count, nf4)
            packed.load_state_dict(stored, strict=False)  # without the bias
            return packed.weight
        state = {name: value for name, value in stored.items() if name.startswith("weight.")}
        if state:
            return bnb.dequantize_4bit(weight, QuantState.from_dict(state, weight.device))
        return weight


def corrected(
    lora_a: Tensor, lora_b: Tensor, change: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The factors that do on W + change what lora_a and lora_b did on W.

    Args:
        lora_a, lora_b: (r, in) and (out, r), any dtype, which the result has too.
        change: W_full - W_small, (out, in).
        scale: s = alpha / r.
    """
    u, s, vh = torch.linalg.svd(lora_a.double().T, full_matrices=False)
    b = lora_b.double() @ vh.T * s
    taken = change.double() @ u / scale
    limit, size = LIMIT * b.abs().mean(0), taken.abs().mean(0)
    b -= taken * torch.where(size > limit, limit / size, 1.0)
    return u.T.to(lora_a.dtype).contiguous(), b.to(lora_b.dtype)
