"""Exact parameter counts and estimated memory, from a config alone: no weights are read.

The counts come from the model classes themselves, built on the meta device, so there is no formula
that could drift from the code. They reproduce the paper's tables to the last digit.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import AdapterConfig
from loram.kept import Kept
from loram.model import model_class, pruned_config
from loram.prune import PruneConfig, choose
from loram.taylor import random_scores

# Bits of one NF4 weight with double quantisation (QLoRA, section 3): 4, an 8-bit constant for
# every 64 weights, and a 32-bit one for every 64 * 256.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Size:
    """Parameters of one model.

    Attributes:
        total: all parameters, tied ones once.
        linears: those in the decoder's linears, which NF4 quantises.
        frozen_in_alignment: lm_head, and the embeddings that are tied to it.
    """

    total: int
    linears: int
    frozen_in_alignment: int

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.total

    @property
    def nf4_bytes(self) -> int:
        """As bitsandbytes keeps them: linears in NF4 with constants, the rest in 16 bits."""
        return round(self.linears * NF4_BITS / 8 + 2 * (self.total - self.linears))

    @property
    def paper_nf4_parameters(self) -> float:
        """The paper's way of counting NF4: every parameter a quarter of one."""
        return self.total / 4


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` (full or pruned) with shapes and no storage."""
    with torch.device("meta"):
        return model_class(config.model_type)(config)


def size(config: PreTrainedConfig) -> Size:
    """Parameter counts of a full or pruned config."""
    model = meta_model(config)
    linears = sum(m.weight.numel() for m in _linears(model))
    head = model.get_output_embeddings().weight
    return Size(sum(p.numel() for p in model.parameters()), linears, head.numel())


def pruned_size(config: PreTrainedConfig, prune: PruneConfig) -> Size:
    """Parameter counts after pruning: they depend on the widths, not on which groups stay."""
    return size(planned_config(config, prune))


def planned_config(config: PreTrainedConfig, prune: PruneConfig) -> PreTrainedConfig:
    """The config that pruning will produce, as far as shapes go."""
    kept: Kept = choose(random_scores(config, 0), config, prune)
    return pruned_config(config, kept)


def lora_parameters(config: PreTrainedConfig, adapter: AdapterConfig) -> int:
    """Parameters of a LoRA adapter on a full or pruned model."""
    return sum(
        adapter.r * (module.in_features + module.out_features)
        for name, module in meta_model(config).named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in adapter.targets
    )


def activation_bytes(config: PreTrainedConfig, tokens: int, checkpointing: bool) -> int:
    """Estimated bytes of bf16 activations kept for backward at `tokens` a micro-batch.

    Inputs of every linear, of norms, of the attention product and of the activation function; with
    gradient checkpointing one residual stream a layer and one layer in full.
    """
    model = meta_model(config)
    stream = config.hidden_size
    per_layer = []
    for layer in model.model.layers:
        q = layer.self_attn.q_proj.out_features
        kv = layer.self_attn.k_proj.out_features
        neurons = layer.mlp.gate_proj.out_features
        # Norms keep a float32 copy and their output; attention q, k, v, rotated q, k and output.
        per_layer.append(2 * (2 * stream + 4 * stream + 3 * q + 4 * kv + 4 * neurons + 2 * stream))
    if checkpointing:
        return tokens * (2 * stream * len(per_layer) + max(per_layer))
    return tokens * sum(per_layer)


def align_bytes(
    config: PreTrainedConfig, tokens: int, checkpointing: bool, workers: int = 1
) -> int:
    """Estimated peak of alignment a worker: float32 weights, gradients and two moments (divided
    over the workers by FSDP2), and activations."""
    count = size(config)
    trained = count.total - count.frozen_in_alignment
    held = (16 * trained + 2 * count.frozen_in_alignment) // workers
    return held + activation_bytes(config, tokens, checkpointing)


def sft_bytes(
    config: PreTrainedConfig, adapter: AdapterConfig, nf4: bool, tokens: int, checkpointing: bool
) -> int:
    """Estimated peak of LoRA training: the frozen base, 16 bytes a LoRA weight, activations."""
    count = size(config)
    base = count.nf4_bytes if nf4 else count.bf16_bytes
    lora = 16 * lora_parameters(config, adapter)
    return base + lora + activation_bytes(config, tokens, checkpointing)


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
