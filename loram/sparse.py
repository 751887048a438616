"""SparseGPT over a whole model, one decoder layer in memory at a time.

Each layer is pruned from the inputs that it gets from the layers pruned before it, so that it can
make up for their errors too. q, k and v share their inputs, and gate and up theirs: four Hessians.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from loram.compressed import stored
from loram.errors import refuse
from loram.kept import Kept
from loram.layers import Layers, Spool, forward
from loram.loss import Batch, trained_tokens
from loram.masks import layer_file, packed, part_masks, unpacked
from loram.model import read_config
from loram.prune import PruneConfig, pattern
from loram.pruned import compressed_config
from loram.shards import (
    Checkpoint,
    finite,
    link,
    note,
    noted,
    part_file,
    save_whole,
    write_part,
    write_rest,
)
from loram.sparsegpt import DAMPING, Hessian, Pattern, factor, sparsify_

DAMPINGS = "dampings.json"
# What has the same inputs, in the order of pruning; the widest Hessian comes last, when the others
# are gone.
SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@torch.no_grad()
def sparsify(
    source: str | Path,
    out: Path,
    batches: Iterable[Batch],
    config: PruneConfig,
    *,
    work: Path | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Write `source` with single weights of every decoder layer removed to `out`.

    `out` becomes an ordinary model directory of the same shapes, with exact zeros, the masks beside
    it (`loram.masks`), weights in their dtype. Peak memory: one layer in float32 with its Hessians,
    and the activations of one batch or the widest Hessian once more; of LLaMA-2-70B that is 2.9
    layers, of Qwen2.5-7B, whose MLP is five times as wide as the rest, 4.1.

    Args:
        source: directory or hub id of the full model.
        batches: calibration, dicts of int64 (batch, seq_len): input_ids, labels, position_ids.
        work: where activations and finished layers wait; after a crash the same call goes on at
            the layer it had reached. Emptied at the end.

    Returns: highest_damping: share of the mean diagonal that made every Hessian positive definite;
        raised_dampings: how many matrices took more than 0.01.

    Raises:
        UserError: the pattern does not divide a matrix.
        ValueError: no calibration tokens, or NaN or Inf in a weight or out of a layer (named).
    """
    if work is None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent) as directory:
            return sparsify(source, out, batches, config, work=Path(directory), device=device)
    batches, removed = list(batches), pattern(config)
    trained_tokens(batches)  # there are some, or it raises
    layers, spool, done = Layers(source, device=device), Spool(work / "activations"), work / "done"
    done.mkdir(parents=True, exist_ok=True)
    report = done / DAMPINGS
    if not spool.names():
        spool.write("input-0", layers.embedded(batches))
    reached = next(i for i in range(len(layers) + 1) if f"input-{i}" in spool.names())
    for i in range(reached, len(layers)):
        dampings = sparsify_layer(layers, i, batches, spool, removed, done)
        note(report, dampings)
        spool.drop(f"input-{i}")
    _finish(layers, done, out)
    found = noted(report)
    spool.clear()
    Spool(done).clear()
    return {
        "highest_damping": max(found.values()),
        "raised_dampings": sum(damping > DAMPING for damping in found.values()),
    }


def compress(source: Path, out: Path, nf4: bool) -> None:
    """Write a sparse model in compressed form, layer by layer; `loram.load` opens it.

    Args:
        source: directory that `loram.sparse.sparsify` wrote, aligned or not.
        nf4: quantise the survivors to NF4 with double quantisation; else they stay in bf16.

    Raises:
        UserError: the model has no masks.
    """
    checkpoint, out = Checkpoint(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    survivors: dict[str, int] = {}
    for part in checkpoint.parts():
        tensors = checkpoint.tensors(part)
        for module, bits in part_masks(source, part).items():
            weight = tensors.pop(f"{module}.weight")
            values = weight[unpacked(bits, weight.shape[1])].to(torch.bfloat16)
            survivors[module] = len(values)
            tensors[f"{module}.bits"] = bits
            tensors |= stored(module, values, nf4)
        write_part(out, part, tensors)
    if not survivors:
        refuse("model", f"{source} without masks", "a model that SparseGPT pruned")
    write_rest(out, compressed_config(read_config(source), survivors, nf4), checkpoint.path)


def sparsify_layer(
    layers: Layers, i: int, batches: list[Batch], spool: Spool, removed: Pattern, done: Path
) -> dict[str, float]:
    """Write layer `i` and its masks to `done`, its outputs to the spool; returns the dampings."""
    layer, part = layers.layer(i), f"model.layers.{i}"
    _check(layer, part, removed)
    hessians = _hessians(layers, i, layer, batches, spool)
    masks, dampings = {}, {}
    for names in SHARED:
        try:
            upper, dead, damping = factor(hessians.pop(names[0]).matrix)
        except ValueError as error:
            raise ValueError(f"{error} of {part}.{names[0]}") from None
        dampings[f"{part}.{names[0]}"] = damping
        for name in names:
            weight = layer.get_submodule(name).weight
            masks[f"{part}.{name}"] = packed(sparsify_(weight, upper, dead, removed))
        del upper
    tensors = {}
    for name, tensor in layer.state_dict().items():
        kept = tensor.to(layers.checkpoint.read(f"{part}.{name}").dtype)
        tensor.copy_(kept)  # what follows sees the weights as they are kept
        tensors[f"{part}.{name}"] = kept.cpu()
    write_part(done, part, tensors)
    save_whole(masks, layer_file(done, i))
    inputs = spool.read_all(f"input-{i}")
    spool.write(f"input-{i + 1}", forward(layers, i, layer, batches, inputs))
    return dampings


def _check(layer: nn.Module, part: str, removed: Pattern) -> None:
    for names in SHARED:
        for name in names:
            removed.check(layer.get_submodule(name).in_features, f"{part}.{name}")


def _hessians(
    layers: Layers, i: int, layer: nn.Module, batches: list[Batch], spool: Spool
) -> dict[str, Hessian]:
    """Of the inputs of each group of `SHARED`, under the group's first name."""
    hessians, hooks = {}, []
    for names in SHARED:
        linear = layer.get_submodule(names[0])
        hessian = hessians[names[0]] = Hessian(linear.in_features, layers.device)

        def add(module: nn.Module, inputs: tuple[Tensor, ...], to: Hessian = hessian) -> None:
            to.add(inputs[0])

        hooks.append(linear.register_forward_pre_hook(add))
    for _ in forward(layers, i, layer, batches, spool.read_all(f"input-{i}")):
        pass
    for hook in hooks:
        hook.remove()
    return hessians


def _finish(layers: Layers, done: Path, out: Path) -> None:
    """The finished layers, with the rest of the model as it is, become a model directory."""
    out.mkdir(parents=True, exist_ok=True)
    for part in layers.checkpoint.parts():
        if not part_file(done, part).exists():
            tensor = finite(layers.checkpoint.read(part), part)
            write_part(done, part, {part: tensor})
    for file in done.glob("*.safetensors"):
        link(file, out / file.name)  # a crash in between loses no layer
    write_rest(out, layers.config, layers.checkpoint.path)
    Kept.whole(layers.config).save(out)
