"""A frozen linear that stores survivors and one bit a weight, and nothing for what was pruned.

Bits a weight: 9.0 for n:m 1/2 with survivors in bf16, 3.06 with survivors in NF4, 2.86 for 55 %
unstructured in NF4. The dense weight exists while a product with it is computed, and no longer.
"""

from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from loram.masks import unpacked

BLOCK, NESTED = 64, 256  # weights a constant, constants a constant of constants (QLoRA, section 3)


class CompressedLinear(nn.Linear):
    """`nn.Linear` on a frozen weight with holes; its `weight` is made anew each time it is read.

    Buffers, all uint8 so that no cast of a model changes them: `bits` (out, ceil(in / 8)) as
    `loram.masks` packs them; `survivors`, row by row, bf16 as two bytes each or NF4 as one code in
    four bits; `scales`, of NF4 the double-quantised constants.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, survivors: int, nf4: bool
    ) -> None:
        nn.Module.__init__(self)  # without a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.count, self.nf4 = survivors, nf4

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8)

        self.register_buffer("bits", empty(out_features, -(-in_features // 8)))
        self.register_buffer("survivors", empty((survivors + 1) // 2 if nf4 else 2 * survivors))
        if nf4:
            blocks = -(-survivors // BLOCK)
            self.register_buffer("scales", empty(blocks + 4 * -(-blocks // NESTED) + 4))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The dense weight, bf16 (out, in), exact zeros where something was pruned."""
        if self.nf4:
            values = bnb.dequantize_4bit(self.survivors[:, None], self._state()).flatten()
        else:
            values = self.survivors.view(torch.bfloat16)
        return spread(values, self.bits, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), equal to the dense layer with zeros."""
        return _Product.apply(x, self)

    def _state(self) -> QuantState:
        blocks = -(-self.count // BLOCK)
        constants, rest = self.scales[:blocks], self.scales[blocks:].clone().view(torch.float32)
        device = self.survivors.device
        nested = QuantState(
            absmax=rest[:-1],
            code=bnb.create_dynamic_map().to(device),
            blocksize=NESTED,
            dtype=torch.float32,
        )
        return QuantState(
            absmax=constants,
            shape=torch.Size([self.count]),
            code=bnb.get_4bit_type("nf4", device=device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=rest[-1],
            state2=nested,
        )


def spread(values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """Survivors to the dense matrix: for each weight the place of its survivor, or that of a zero.

    A table of all 256 bytes does eight weights at a time: on a CPU faster than
    `masked_scatter_`, which goes weight by weight.
    """
    places, counts = tables(bits.device)
    each = bits.flatten().int()
    count = counts.index_select(0, each)
    before = count.cumsum(0, dtype=torch.int32) - count
    place = places.index_select(0, each).add_(before.unsqueeze(1)).clamp_(min=0)
    dense = F.pad(values, (1, 0)).index_select(0, place.flatten())
    return dense.view(len(bits), -1)[:, :columns]


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each byte, int32: which survivor each of its bits is, from 1 (256, 8), far below zero
    where there is none; and how many it has (256)."""
    kept = unpacked(torch.arange(256, dtype=torch.uint8)[:, None], 8).to(device)
    places = kept.cumsum(1, dtype=torch.int32).masked_fill_(~kept, -(2**30))
    return places, kept.sum(1, dtype=torch.int32)


class _Product(torch.autograd.Function):
    """x W^T + b for frozen W and b; W is unpacked in both directions instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        weight, bias = layer.weight, layer.bias
        if not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


def stored(module: str, values: Tensor, nf4: bool) -> dict[str, Tensor]:
    """The buffers of a `CompressedLinear` for bf16 survivors, row by row, beside `bits`."""
    if not nf4:
        return {f"{module}.survivors": values.view(torch.uint8)}
    codes, state = bnb.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    constants = torch.cat([state.state2.absmax, state.offset.reshape(1)])
    scales = torch.cat([state.absmax, constants.view(torch.uint8)])
    return {f"{module}.survivors": codes.flatten(), f"{module}.scales": scales}
