"""Estimated peak memory of what is done a layer at a time, from a config alone: scores, SparseGPT,
stand-ins, the large model's targets and offsets. Counted as in `loram.memory`."""

from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import AdapterConfig, attach
from loram.by_row import from_float8, to_float8
from loram.distil import top_tokens
from loram.live import Live, counting, inputs, layers_of_each_shape, weight_count
from loram.loss import summed_loss
from loram.plan import lora_parameters, size
from loram.prune import STRUCTURED, PruneConfig


def prune_bytes(config: PreTrainedConfig, prune: PruneConfig, rows: int, seq_len: int) -> int:
    """Peak of scoring (stru) or SparseGPT (semi, unst), which hold a layer at a time in float32,
    and of which scoring computes in bfloat16.

    The most of: a layer with its gradients, or with its Hessians and a factor of the widest, and
    the activations of one batch; the output head with its loss.
    """
    (model, _), scored = layers_of_each_shape(config), prune.method in STRUCTURED
    layer = model.model.layers[-1]
    model.float().requires_grad_(scored)
    with counting(model, mixed=scored) as live, torch.set_grad_enabled(scored):
        hidden, given = inputs(model, rows, seq_len)
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
        return 4 * weight_count(layer) + in_layer
    return max(4 * weight_count(layer) + in_layer, in_head)


def compensate_bytes(
    config: PreTrainedConfig, rows: int, seq_len: int, gradients: bool = False
) -> int:
    """Peak of compensation of a full model of that config, which computes in bfloat16.

    A layer of it and one of the small one, counted as large, in float32; beside them the second
    moments of a sub-block, in float32, with what it keeps for its backward pass, or, while they are
    solved, in float64. With gradients twice as many; or the output head with its loss.
    """
    model, _ = layers_of_each_shape(config)
    layer = model.model.layers[-1]
    model.float().requires_grad_(False)
    with counting(model) as live, torch.set_grad_enabled(gradients):
        hidden, given = inputs(model, rows, seq_len)
        for block in (partial(layer.self_attn, **given), layer.mlp):
            output = block(hidden)
            output = output[0] if isinstance(output, tuple) else output
            if gradients:
                torch.autograd.grad(output, hidden, torch.empty_like(output))
            del output
        in_layer = live.peak
        in_head = _loss_of_head(model, hidden) if gradients else 0
    moments, solved = (4 * 4, 12 * 8) if gradients else (2 * 4, 8 * 8)
    beside = moments * config.hidden_size**2 + max(in_layer, solved * config.hidden_size**2)
    return max(2 * 4 * weight_count(layer) + beside, in_head)


@torch.no_grad()
def targets_bytes(config: PreTrainedConfig, rows: int, seq_len: int, top: int) -> int:
    """Peak of finding the large model's targets, which computes in bfloat16: that of a batch's way
    through it, or the output head in float32 and the logits of its chunks."""
    model, _ = layers_of_each_shape(config)
    head = model.float().get_output_embeddings()
    with counting(model) as live:
        hidden, _ = inputs(model, rows, seq_len)
        top_tokens(head, hidden, top)
    return max(_walk(config, rows, seq_len), 4 * head.weight.numel() + live.peak)


@torch.no_grad()
def offsets_bytes(
    config: PreTrainedConfig,
    small: PreTrainedConfig,
    adapter: AdapterConfig | None,
    nf4: bool,
    rows: int,
    seq_len: int,
) -> int:
    """Peak of finding offsets, which computes in bfloat16: that of a batch's way through the large
    model; or the whole small one as it is trained and what one of its layers makes of a batch.

    Args:
        config, small: of the full model, and of the one that is trained; if sparse, compressed.
        adapter: of a training in parts, whose later ones find offsets with it.
        nf4: whether the small one's linears are quantised, by bitsandbytes or as survivors.
    """
    count, (model, _) = size(small), layers_of_each_shape(small, nf4)
    held = count.nf4_bytes if nf4 else count.bf16_bytes
    lora = 4 * lora_parameters(small, adapter) if adapter else 0
    whole = attach(model, adapter) if adapter else model
    with counting(whole.eval()) as live:
        hidden, given = inputs(model, rows, seq_len)
        for layer in model.model.layers:
            hidden = layer(hidden, **given)
            kept = to_float8(torch.empty_like(hidden) - hidden)
            hidden = hidden + from_float8(kept).to(hidden)
    return max(_walk(config, rows, seq_len), held + lora + max(live.peak, lora))  # read, then set


def _walk(config: PreTrainedConfig, rows: int, seq_len: int) -> int:
    """Peak of batches' way through a full model: its embeddings or a layer, in float32, and beside
    what a layer makes of a batch what came out of it of the one before."""
    model, _ = layers_of_each_shape(config)
    layer, embeddings = model.float().model.layers[-1], model.get_input_embeddings()
    with counting(model) as live:
        hidden, given = inputs(model, rows, seq_len)
        layer(hidden, **given)
    in_layer = 4 * weight_count(layer) + live.peak
    return hidden.nbytes + max(in_layer, 4 * embeddings.weight.numel() + hidden.nbytes)


def _loss_of_head(model: PreTrainedModel, hidden: torch.Tensor) -> int:
    """Peak of the output head in float32, and the gradient at what it is given."""
    head = model.get_output_embeddings().requires_grad_(False)
    live = Live([model])
    with live, torch.enable_grad():
        states = torch.empty_like(hidden).flatten(0, 1).requires_grad_(True)
        summed_loss(head, states, torch.empty(len(states), dtype=torch.int64))
    return 4 * head.weight.numel() + live.peak
