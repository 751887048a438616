"""Estimated peak memory of pruning, alignment and SFT, from a config alone.

What a layer keeps for its backward pass depends on the model family, on LoRA, on autocast and on
the linear's storage. So nothing of it is written down here: one layer of each shape, the loss and
their backward passes are run on tensors without storage, and what would live is counted.
"""

import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import AdapterConfig, attach
from loram.loss import summed_loss
from loram.packed import PackedLinear, spread, tables
from loram.parallel import masters_
from loram.plan import lora_parameters, size
from loram.prune import STRUCTURED, PruneConfig
from loram.pruned import meta_model
from loram.train import train_all_


def sft_bytes(
    config: PreTrainedConfig,
    adapter: AdapterConfig,
    nf4: bool,
    rows: int,
    seq_len: int,
    checkpointing: bool,
    offsets: int = 0,
) -> int:
    """Peak of LoRA training with micro-batches of `rows` x `seq_len`, more than one a step.

    The frozen base; a LoRA weight, its gradient and two moments in float32; activations, and the
    offsets of a micro-batch.

    Args:
        config: of the model that is trained; of a sparse one, once packed.
        nf4: whether its linears are quantised, by bitsandbytes or as survivors.
        offsets: layers after which the residual stream is corrected.
    """
    count, (model, counts) = size(config), _layers_of_each_shape(config)
    if nf4:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, _Dequantised(module))
    lora = 16 * lora_parameters(config, adapter)
    base = count.nf4_bytes if nf4 else count.bf16_bytes
    base += offsets * rows * seq_len * (config.hidden_size + 4)
    adapted = attach(model, adapter)
    return base + lora + _activations(adapted, model, counts, rows, seq_len, checkpointing)


def align_bytes(
    config: PreTrainedConfig,
    rows: int,
    seq_len: int,
    checkpointing: bool,
    *,
    workers: int = 1,
    masked: int = 0,
) -> int:
    """Peak of alignment a worker, with micro-batches of `rows` x `seq_len`, more than one a step.

    A weight that is trained, its gradient and two moments in float32, others in bf16, all divided
    over the workers by FSDP2, which then holds two layers whole in bf16 and the gradient of one in
    float32; activations. Of distillation the same, and not its targets.

    Args:
        config: of the model as it is aligned, not packed.
        masked: weights that have a place in a mask: a byte each.
    """
    whole = train_all_(meta_model(config))
    frozen = sum(weight.numel() for weight in whole.parameters() if not weight.requires_grad)
    held = (16 * (size(config).total - frozen) + 2 * frozen + masked) // workers
    model, counts = _layers_of_each_shape(config)
    train_all_(model)
    if workers == 1:
        masters_(model)
    else:
        layer = max(_count(layer) for layer in model.model.layers)
        held += 8 * layer + 2 * size(config).frozen_in_alignment
    return held + _activations(model, model, counts, rows, seq_len, checkpointing)


def prune_bytes(config: PreTrainedConfig, prune: PruneConfig, rows: int, seq_len: int) -> int:
    """Peak of scoring (stru) or SparseGPT (semi, unst), which hold a layer at a time in float32,
    and of which scoring computes in bfloat16.

    The most of: a layer with its gradients, or with its Hessians and a factor of the widest, and
    the activations of one batch; the output head with its loss.
    """
    (model, _), scored = _layers_of_each_shape(config), prune.method in STRUCTURED
    layer = model.model.layers[-1]
    model.float().requires_grad_(scored)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=scored, cache_enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True), mixed:
        model.to_empty(device="cpu")
        live = _Live([model])
        with live, torch.set_grad_enabled(scored):
            hidden, given = _inputs(model, rows, seq_len)
            output = layer(hidden, **given)
            if scored:
                output.backward(torch.empty_like(output))
        in_layer = live.peak
        in_head = _loss_of_head(model, hidden) if scored else 0
    if not scored:
        into = [m.in_features for m in (layer.self_attn.q_proj, layer.self_attn.o_proj)]
        into += [layer.mlp.gate_proj.in_features, layer.mlp.down_proj.in_features]
        hessians = [4 * width**2 for width in into]
        # Beside one that is factored, its factor.
        factored = max(sum(hessians[i:]) + hessians[i] for i in range(4))
        in_layer = max(in_layer + sum(hessians), factored)
        return 4 * _count(layer) + in_layer
    return max(4 * _count(layer) + in_layer, in_head)


def compensate_bytes(
    config: PreTrainedConfig, rows: int, seq_len: int, gradients: bool = False
) -> int:
    """Peak of compensation of a full model of that config, which computes in bfloat16.

    A layer of it and one of the small one, counted as large, in float32; beside them the second
    moments of a sub-block, in float32, with what it keeps for its backward pass, or, while they are
    solved, in float64. With gradients twice as many; or the output head with its loss.
    """
    model, _ = _layers_of_each_shape(config)
    layer = model.model.layers[-1]
    model.float().requires_grad_(False)
    mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True), mixed, torch.set_grad_enabled(gradients):
        model.to_empty(device="cpu")
        live = _Live([model])
        with live:
            hidden, given = _inputs(model, rows, seq_len)
            for block in (partial(layer.self_attn, **given), layer.mlp):
                output = block(hidden)
                output = output[0] if isinstance(output, tuple) else output
                if gradients:
                    torch.autograd.grad(output, hidden, torch.empty_like(output))
                del output
        in_head = _loss_of_head(model, hidden) if gradients else 0
    moments, solved = (4 * 4, 12 * 8) if gradients else (2 * 4, 8 * 8)
    beside = moments * config.hidden_size**2 + max(live.peak, solved * config.hidden_size**2)
    return max(2 * 4 * _count(layer) + beside, in_head)


def _loss_of_head(model: PreTrainedModel, hidden: torch.Tensor) -> int:
    """Peak of the output head in float32, and the gradient at what it is given."""
    head = model.get_output_embeddings().requires_grad_(False)
    live = _Live([model])
    with live, torch.enable_grad():
        states = torch.empty_like(hidden).flatten(0, 1).requires_grad_(True)
        summed_loss(head, states, torch.empty(len(states), dtype=torch.int64))
    return 4 * head.weight.numel() + live.peak


def _layers_of_each_shape(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[int]]:
    """The model in bf16 without storage, of equal layers the last alone; how many there were."""
    model = meta_model(config).bfloat16()
    shapes = [
        tuple(weight.shape for weight in layer.state_dict().values())
        for layer in model.model.layers
    ]
    last = {shape: i for i, shape in enumerate(shapes)}
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in sorted(last.values()))
    return model, [Counter(shapes)[shapes[i]] for i in sorted(last.values())]


def _activations(
    trained: nn.Module,
    model: PreTrainedModel,
    counts: list[int],
    rows: int,
    seq_len: int,
    checkpointing: bool,
) -> int:
    """Peak of what lives beside weights, gradients and optimiser in a micro-batch.

    Every layer in `model` stands for `counts` of them: what it keeps counts as often.
    """
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    tables(torch.device("cpu"))  # made before, so that real ones are remembered
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained.to_empty(device="cpu").train()
        for weight in trained.parameters():
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        live, inside, outside = _Live([trained]), 0, 0
        with live:
            hidden, given = _inputs(model, rows, seq_len)
            start = hidden
            for layer, count in zip(model.model.layers, counts, strict=True):
                before = live.now
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    hidden = layer(hidden, **given)
                    cast = live.now
                # Casts of trained weights are remembered until the forward pass has ended.
                inside += count * (cast - live.now)
                outside += (count - 1) * (live.now - before)
            live.peak = live.now
            with torch.autocast("cpu", dtype=torch.bfloat16):
                states = model.model.norm(hidden).flatten(0, 1).clone()
                loss = summed_loss(
                    model.get_output_embeddings(),
                    states,
                    torch.empty(len(states), dtype=torch.int64),
                )
            del states
            peak = live.peak + inside + outside
            live.peak = live.now
            loss.backward()
            peak = max(peak, live.peak + outside)
            del hidden, loss
            live.peak = live.now
            embedded = model.get_input_embeddings()(torch.empty(rows, seq_len, dtype=torch.int64))
            if embedded.requires_grad:
                embedded.backward(start.grad)
            return max(peak, live.peak)


def _inputs(model: PreTrainedModel, rows: int, seq_len: int) -> tuple[Tensor, dict[str, Any]]:
    """A batch, embedded, and what layers are called with; rows hold several documents."""
    ids, _, positions = (torch.empty(rows, seq_len, dtype=torch.int64) for _ in range(3))
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_(torch.is_grad_enabled())
    given = {
        "attention_mask": torch.empty(rows, 1, seq_len, seq_len, dtype=torch.bool),
        "position_embeddings": model.model.rotary_emb(hidden, position_ids=positions),
        "position_ids": positions,
    }
    return hidden, given


def _count(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters())


class _Dequantised(PackedLinear):
    """Stands for a linear in NF4, dense or packed: its bf16 values exist while they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        survivors = linear.count if isinstance(linear, PackedLinear) else 0
        shape = linear.in_features, linear.out_features, linear.bias is not None
        super().__init__(*shape, survivors, nf4=False)
        self.to("meta")

    @property
    def weight(self) -> Tensor:
        values = self.count or self.out_features * self.in_features
        made = torch.empty(values, dtype=torch.bfloat16)
        if self.count:
            return spread(made, self.bits, self.in_features)
        return made.view(self.out_features, self.in_features)


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors made in its scope, as long as they live, and their peak."""

    def __init__(self, known: list[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for module in known:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._seen[tensor.untyped_storage()] = True
                if tensor.grad is not None:
                    self._seen[tensor.grad.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size
