"""Which single weights survive where no row or column leaves: one bit a weight, in files.

The mask is never inferred from zeros: NF4 has an exact zero code, and a weight can be zero by
chance.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def packed(mask: Tensor) -> Tensor:
    """Bool (out, in), 1 for a survivor -> uint8 (out, ceil(in / 8)), lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """The bool (out, columns) that `packed` was given."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> places).bitwise_and_(1).bool().flatten(-2)[..., :columns]


def layer_file(directory: str | Path, layer: int) -> Path:
    """The masks of one decoder layer: uint8 (out, ceil(in / 8)) under full module names."""
    return Path(directory) / f"masks-{layer:05d}.safetensors"


def layer_masks(directory: str | Path, layer: int) -> dict[str, Tensor]:
    """The packed masks of one layer by module name; empty where nothing was pruned singly."""
    file = layer_file(directory, layer)
    return load_file(file) if file.is_file() else {}


def part_masks(directory: str | Path, part: str) -> dict[str, Tensor]:
    """`layer_masks` of a part of a model such as `model.layers.3`; empty for what is no layer."""
    layer = part.rpartition(".")[2]
    return layer_masks(directory, int(layer)) if layer.isdigit() else {}


def has_masks(directory: str | Path) -> bool:
    """Whether single weights were pruned there."""
    return any(Path(directory).glob("masks-*.safetensors"))


def of_weights(model: PreTrainedModel, directory: str | Path) -> dict[nn.Parameter, Tensor]:
    """The bool mask of every weight of a model in memory; empty for one pruned by groups.

    Args:
        model: dense, divided over processes (FSDP2; then so are the masks) or not.
        directory: of the pruned model.
    """
    found = {}
    for layer in range(len(model.model.layers)):
        for name, bits in layer_masks(directory, layer).items():
            weight = model.get_submodule(name).weight
            mask = unpacked(bits.to(weight.device), weight.shape[1])
            if isinstance(weight, DTensor):  # every process has read the same file
                mesh, placements = weight.device_mesh, weight.placements
                mask = distribute_tensor(mask, mesh, placements, src_data_rank=None)
            found[weight] = mask
    return found


def copy_masks(source: str | Path, out: Path) -> None:
    """Copy the masks of a directory, if it has any, to another one."""
    for file in Path(source).glob("masks-*.safetensors"):
        shutil.copyfile(file, Path(out) / file.name)
