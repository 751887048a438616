"""One training over several processes: DDP, FSDP2, and checkpoints for any number of processes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from loram.errors import refuse
from loram.loss import CausalLoss


def world() -> tuple[int, int]:
    """(rank, processes) of this process; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def replicate(module: CausalLoss) -> nn.Module:
    """A copy of the model on every process (DDP), for adapters: only their gradients travel."""
    if world()[1] == 1:
        return module
    # Every process has read the same files and drawn the adapter from the same seed.
    return DistributedDataParallel(module, forward_sync_buffers=False, init_sync=False)


def shard(module: CausalLoss, device: torch.device) -> nn.Module:
    """Weights, gradients and optimiser divided over all processes (FSDP2), layer by layer.

    Trained weights become fp32 masters as they are divided, so that no process ever holds all of
    them; computation is in bf16, gradients are summed in fp32.

    Raises:
        UserError: the model is quantised. bitsandbytes and FSDP2 silently give wrong numbers.
    """
    base = cast(PreTrainedModel, module.model)
    if getattr(base, "is_quantized", False):
        refuse("sharding (FSDP2)", "a 4-bit model", "a model in bf16; 4-bit models train with DDP")
    mesh = dist.init_device_mesh(device.type, (world()[1],))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in base.model.layers:
        fully_shard(masters_(layer), mesh=mesh, mp_policy=policy)
    # Distillation's targets are inputs, too.
    as_given = replace(policy, cast_forward_inputs=False)
    return fully_shard(masters_(module), mesh=mesh, mp_policy=as_given)


def masters_(module: nn.Module) -> nn.Module:
    """Turn the weights that are trained into fp32, in place: bf16 would lose small updates."""
    for weight in module.parameters():
        if weight.requires_grad and weight.dtype != torch.float32:
            weight.data = weight.data.float()
    return module


def save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the trained weights, the optimiser and the step count. Every process calls it.

    Safetensors and JSON only. Each process writes its own part, in torch's distributed layout,
    so another number of processes can continue.
    """
    rank, _ = world()
    if rank == 0:
        shutil.rmtree(path, ignore_errors=True)  # what a killed process left half written
        path.mkdir(parents=True)
    barrier()
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    dcp.save(_tensors(module, optimizer), storage_writer=writer, no_dist=world()[1] == 1)
    if rank == 0:
        (path / "state.json").write_text(json.dumps({"step": step}))


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Continue from `save_state`, bit by bit; returns the number of steps that were done."""
    step = json.loads((path / "state.json").read_text())["step"]
    reader = HuggingFaceStorageReader(str(path))
    dcp.load(_tensors(module, optimizer), storage_reader=reader, no_dist=world()[1] == 1)
    for state in optimizer.state.values():
        state["step"].fill_(step)
    return step


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """Put the trained weights of `save_state` into a plain model, in that model's dtype.

    Raises:
        KeyError: a weight that this model does not have.
    """
    reader = HuggingFaceStorageReader(str(path))
    saved = reader.read_metadata().state_dict_metadata
    weights = dict(CausalLoss(model).named_parameters())
    found = {name: weights[name].data for name in saved if not name.startswith("exp_avg")}
    dcp.load(found, storage_reader=reader, no_dist=True)


def barrier() -> None:
    if world()[1] > 1:
        dist.barrier()


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a step changes, under the parameters' names."""
    if isinstance(module, DistributedDataParallel):
        module = module.module
    if isinstance(module, FSDPModule):
        module.reshard()  # after an evaluation the outermost weights are still whole
    tensors: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            tensors[name] = weight.data
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = optimizer.state[weight][moment]
    return tensors
