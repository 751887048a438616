"""The masked update: s * (B A) * M, LoRA that stays where weights survived.

It follows from the paper's equations for Semi and Unst, and from no released code. The plain update
is the default; this one is no longer of low rank, so stock PEFT must not open it as if it were:
its `peft_type` is one that PEFT refuses by name. Merged, it is in every tool.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loram.compressed import CompressedLinear
from loram.errors import refuse
from loram.masks import layer_file, part_masks, unpacked

PEFT_TYPE = "LORAM_MASKED"


class MaskedLora(Linear):
    """PEFT's LoRA around a linear, with a packed mask on the product of its factors."""

    bits: Tensor

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) -> (..., out). The masked product exists in full while it is used."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        out = self.base_layer(x)
        for name in self.active_adapters:
            factors = self.lora_A[name].weight, self.lora_B[name].weight
            dropped = self.lora_dropout[name](x).to(factors[0].dtype)
            update = checkpoint(_product, dropped, *factors, self.bits, use_reentrant=False)
            out = out + (self.scaling[name] * update).to(out.dtype)
        return out

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s * (B A) * M, what merging adds to the weight."""
        return super().get_delta_weight(adapter) * unpacked(self.bits, self.in_features)


def set_masks_(model: nn.Module, directory: str | Path) -> None:
    """Give every `MaskedLora` of a PEFT model its mask.

    Args:
        directory: of a pruned model or an adapter, with masks; of a compressed model it needs none.

    Raises:
        UserError: there is none for one of them, or it is not that of the compressed linear.
    """
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MaskedLora):
            continue
        name = name.removeprefix("base_model.model.")
        if name not in masks:
            masks |= part_masks(directory, ".".join(name.split(".")[:3]))
        bits = masks.pop(name, None)
        if isinstance(module.base_layer, CompressedLinear):
            held = module.base_layer.bits
            if bits is not None and not torch.equal(bits.to(held.device), held):
                refuse("adapter.masked", f"{directory} with other masks", "those of the model")
            bits = held
        if bits is None:
            refuse("adapter.masked", f"{directory} without a mask for {name}", "semi, unst")
        bits = bits.to(module.lora_A["default"].weight.device)
        module.register_buffer("bits", bits, persistent=False)


def save_masks(model: nn.Module, out: Path) -> None:
    """Write the masks of every `MaskedLora` of a PEFT model as a pruned model has them."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLora):
            name = name.removeprefix("base_model.model.")
            layers.setdefault(int(name.split(".")[2]), {})[name] = module.bits.cpu()
    for layer, masks in layers.items():
        save_file(masks, layer_file(out, layer))


def _product(x: Tensor, a: Tensor, b: Tensor, bits: Tensor) -> Tensor:
    return F.linear(x, (b @ a) * unpacked(bits, a.shape[1]))
