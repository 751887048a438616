"""Exact parameter counts, from a config alone: no weights are read.

The counts come from the model classes themselves, built on the meta device, so there is no formula
that could drift from the code. They reproduce the paper's tables to the last digit.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from loram.adapter import AdapterConfig
from loram.compressed import CompressedLinear
from loram.kept import Kept
from loram.prune import STRUCTURED, PruneConfig, choose, pattern
from loram.pruned import compensated_config, compressed_config, meta_model, pruned_config
from loram.stand_in import StandIn, blocks_to_fill
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
        masked: places of single weights that survived or not, one bit each.
        stand_ins: parameters of the stand-ins for what was removed (`loram.stand_in`).
        frozen_in_alignment: lm_head, and the embeddings that are tied to it.
    """

    total: int
    linears: int
    frozen_in_alignment: int
    masked: int = 0
    stand_ins: int = 0

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.total + self.masked // 8

    @property
    def nf4_bytes(self) -> int:
        """As bitsandbytes keeps them: linears in NF4 with constants, the rest in 16 bits."""
        rest = 2 * (self.total - self.linears) + self.masked // 8
        return round(self.linears * NF4_BITS / 8) + rest

    @property
    def paper_nf4_parameters(self) -> float:
        """The paper's way of counting NF4: every parameter a quarter of one."""
        return self.total / 4


def size(config: PreTrainedConfig) -> Size:
    """Parameter counts of a full or pruned config."""
    model = meta_model(config)
    linears, survivors, masked = 0, 0, 0
    for module in _linears(model):
        if isinstance(module, CompressedLinear):
            survivors += module.count
            masked += module.out_features * module.in_features
        else:
            linears += module.weight.numel()
    total = sum(p.numel() for p in model.parameters()) + survivors
    head = model.get_output_embeddings().weight
    parts = [m for m in model.modules() if isinstance(m, StandIn)]
    stand_ins = sum(p.numel() for part in parts for p in part.parameters())
    return Size(total, linears + survivors, head.numel(), masked, stand_ins)


def pruned_size(config: PreTrainedConfig, prune: PruneConfig, rank: int = 0) -> Size:
    """Parameter counts after pruning: they depend on the widths, not on which groups stay."""
    return size(planned_config(config, prune, rank))


def planned_config(config: PreTrainedConfig, prune: PruneConfig, rank: int = 0) -> PreTrainedConfig:
    """The config that pruning will produce, as far as shapes go; of sparse models, once compressed.

    Args:
        rank: of the stand-ins, if what was removed is compensated.

    Raises:
        UserError: as `loram.prune.ratio`, or a pattern that does not divide a matrix.
    """
    if prune.method not in STRUCTURED:
        removed = pattern(prune)
        decoder = meta_model(config).named_modules()
        survivors = {}
        for name, module in decoder:
            if isinstance(module, nn.Linear) and ".layers." in name:
                removed.check(module.in_features, name)
                survivors[name] = removed.survivors(module.out_features, module.in_features)
        return _compensated(compressed_config(config, survivors, nf4=False), survivors, rank)
    kept: Kept = choose(random_scores(config, 0), config, prune)
    return _compensated(pruned_config(config, kept), kept.slices(config), rank)


def aligned_config(config: PreTrainedConfig, prune: PruneConfig, rank: int = 0) -> PreTrainedConfig:
    """`planned_config` as it is aligned: weights pruned singly leave memory when the aligned model
    is compressed."""
    planned = planned_config(config, prune, rank)
    if prune.method in STRUCTURED:
        return planned
    return compensated_config(config, getattr(planned, "stand_ins", {}))


def _compensated(config: PreTrainedConfig, cut: Iterable[str], rank: int) -> PreTrainedConfig:
    return compensated_config(config, dict.fromkeys(blocks_to_fill(cut), rank)) if rank else config


def lora_parameters(config: PreTrainedConfig, adapter: AdapterConfig) -> int:
    """Parameters of a LoRA adapter on a full or pruned model."""
    return sum(
        adapter.r * (module.in_features + module.out_features)
        for name, module in meta_model(config).named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in adapter.targets
    )


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
