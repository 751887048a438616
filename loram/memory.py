"""Estimated peak memory of alignment and SFT, from a config alone.

What a layer keeps for its backward pass depends on the model family, on LoRA, on autocast and on
the linear's storage. So nothing of it is written down here: one layer of each shape, the loss and
their backward passes are run on tensors without storage, and what would live is counted.
"""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import AdapterConfig, attach
from loram.compressed import tables
from loram.live import Live, inputs, layers_of_each_shape, weight_count
from loram.loss import summed_loss
from loram.parallel import masters_
from loram.plan import lora_parameters, size
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
        config: of the model that is trained; of a sparse one, once compressed.
        nf4: whether its linears are quantised, by bitsandbytes or as survivors.
        offsets: layers after which the residual stream is corrected.
    """
    count, (model, counts) = size(config), layers_of_each_shape(config, nf4)
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
        config: of the model as it is aligned, not compressed.
        masked: weights that have a place in a mask: a byte each.
    """
    whole = train_all_(meta_model(config))
    frozen = sum(weight.numel() for weight in whole.parameters() if not weight.requires_grad)
    held = (16 * (size(config).total - frozen) + 2 * frozen + masked) // workers
    model, counts = layers_of_each_shape(config)
    train_all_(model)
    if workers == 1:
        masters_(model)
    else:
        layer = max(weight_count(layer) for layer in model.model.layers)
        held += 8 * layer + 2 * size(config).frozen_in_alignment
    return held + _activations(model, model, counts, rows, seq_len, checkpointing)


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
        live, inside, outside = Live([trained]), 0, 0
        with live:
            hidden, given = inputs(model, rows, seq_len)
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
