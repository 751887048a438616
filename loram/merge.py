"""A trained adapter on the weights of its model, one decoder layer in memory at a time."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from loram.adapter_files import (
    FACTORS,
    WEIGHTS,
    check_fits,
    module_and_factor,
    read_adapter,
    refuse_unless_plain,
    shapes,
)
from loram.errors import refuse
from loram.masks import part_masks, unpacked
from loram.model import check_dense, check_weights, read_config
from loram.shards import Checkpoint, write_part, write_rest


@dataclass(frozen=True, eq=False)
class Update:
    """s * lora_B lora_A of one linear: a (r, in), b (out, r) with s in it, both float32; bits: of
    its mask (`loram.masks`), if it has one."""

    a: Tensor
    b: Tensor
    bits: Tensor | None

    def matrix(self) -> Tensor:
        """What it adds to the weight, float32 (out, in)."""
        product = self.b @ self.a
        return product if self.bits is None else product * unpacked(self.bits, self.a.shape[1])

    def beside(self, linear: nn.Module, given: tuple, output: Tensor) -> Tensor:
        """The output of the linear with it, as a forward hook."""
        (x,) = given
        if self.bits is None:
            return output + F.linear(F.linear(x, self.a), self.b)
        return output + F.linear(x, self.matrix())


def updates(adapter: Path, part: str, device: torch.device | str = "cpu") -> dict[str, Update]:
    """The updates of a part of a model, such as `model.layers.3`, by the names of its linears.

    Raises:
        UserError: an adapter that is not plain LoRA, or is damaged.
    """
    config, masks = read_adapter(adapter), part_masks(adapter, part)
    refuse_unless_plain(config)
    if config.get("alpha_pattern"):  # another s for some linears
        refuse("adapter alpha_pattern", config["alpha_pattern"], "none")
    found = {}
    with safe_open(adapter / WEIGHTS, framework="pt", device=str(device)) as file:
        for name in sorted(file.keys()):
            module, factor = module_and_factor(name)
            if factor not in FACTORS:
                refuse("adapter", name, "lora_A and lora_B of linears alone")
            if factor != "lora_A" or not f"{module}.".startswith(f"{part}."):
                continue
            a, b = (file.get_tensor(name.replace("lora_A", f"lora_{x}")).float() for x in "AB")
            scale = config["lora_alpha"] / (
                math.sqrt(len(a)) if config.get("use_rslora") else len(a)
            )
            bits = masks[module].to(device) if module in masks else None
            found[module] = Update(a, b * scale, bits)
    return found


def adapt_layer_(adapter: Path, layer: nn.Module, i: int) -> None:
    """Put an adapter of the full model on its decoder layer `i`, for inference; errors as of
    `updates`.

    It stays a path of its own, as under PEFT: most of a small update would be rounded away where
    weights are cast to 16 bits.
    """
    part = f"model.layers.{i}"
    for name, update in updates(adapter, part, next(layer.parameters()).device).items():
        linear = layer.get_submodule(name.removeprefix(f"{part}."))
        linear.register_forward_hook(update.beside)


def merge(base: str | Path, adapter: Path, out: Path) -> None:
    """Write `base` with the adapter added to its weights to `out`, an ordinary model directory.

    Each sum is done in float32 and rounded once to the dtype of the weight: the base was never
    quantised, so nothing of a QLoRAM adapter is lost in merging. Nothing else of the model changes.
    Peak memory: one layer, and one of its weights and updates in float32.

    Args:
        base: directory or hub id of the model that the adapter is for.
        adapter: as PEFT or `loram.adapter.recover` wrote it.

    Raises:
        UserError: an adapter that is not plain LoRA, or not of this model; a base in NF4 or
            compressed, whose weights cannot take it; one of both is damaged. Nothing was written.
    """
    config, adapter, out = read_config(base, "base"), Path(adapter), Path(out)
    check_dense(config, base, "base")
    if Path(base).is_dir():
        check_weights(Path(base), "base")
    refuse_unless_plain(read_adapter(adapter))
    check_fits(shapes(adapter), config)
    checkpoint = Checkpoint(base)
    tied = [m for m in updates(adapter, "lm_head") if f"{m}.weight" not in checkpoint.names()]
    if tied:
        refuse("adapter", "an update of lm_head, which is tied to the embeddings", "none of it")
    out.mkdir(parents=True, exist_ok=True)
    for part in checkpoint.parts():
        tensors = checkpoint.tensors(part)
        for module, update in updates(adapter, part.removesuffix(".weight")).items():
            weight = tensors[f"{module}.weight"]
            tensors[f"{module}.weight"] = (weight.float() + update.matrix()).to(weight.dtype)
        write_part(out, part, tensors)
    write_rest(out, config, checkpoint.path)
