"""Model classes with the shapes of pruned models, made on the fly from transformers' own.

A pruned model whose layers are all cut alike, to numbers that the stock class accepts, is a stock
model with smaller numbers in its config, and opens in any tool. Otherwise (some layers kept whole,
the paper's setting; single weights gone; stand-ins for what was removed) its `model_type` is
`loram_<base>`: a subclass of the stock class that changes its modules before `from_pretrained`
fills them. Stock loaders refuse that name instead of re-initialising what does not fit.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loram.compressed import CompressedLinear
from loram.kept import LINEARS, Kept, head_dim, widths
from loram.stand_in import stand_in_

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "loram_"


def pruned_config(config: PreTrainedConfig, kept: Kept) -> PreTrainedConfig:
    """The config of the model that keeps `kept`: the stock type where that class can have it."""
    kv_heads, neurons = [len(x) for x in kept.kv_heads], [len(x) for x in kept.neurons]
    common = config.to_dict()
    if len(set(kv_heads)) == 1 and len(set(neurons)) == 1:
        heads = config.num_attention_heads // config.num_key_value_heads * kv_heads[0]
        # Llama's own config refuses a head count that does not divide the hidden size.
        if config.model_type != "llama" or config.hidden_size % heads == 0:
            common |= {
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads[0],
                "head_dim": head_dim(config),
                "intermediate_size": neurons[0],
            }
            return type(config).from_dict(common)
    return _own(config, {"kept_kv_heads": kv_heads, "kept_neurons": neurons})


def compressed_config(
    config: PreTrainedConfig, survivors: dict[str, int], nf4: bool
) -> PreTrainedConfig:
    """The config of a model whose linears are `loram.compressed.CompressedLinear`.

    Args:
        survivors: weights that each of these linears keeps, by module name.
    """
    return _own(config, {"survivors": survivors, "survivors_nf4": nf4})


def compensated_config(config: PreTrainedConfig, ranks: dict[str, int]) -> PreTrainedConfig:
    """The config of a pruned model with stand-ins (`loram.stand_in`).

    Args:
        ranks: of each stand-in, by the name of its sub-block; none leaves the config as it is.
    """
    return _own(config, {"stand_ins": ranks}) if ranks else config


def _own(config: PreTrainedConfig, more: dict[str, Any]) -> PreTrainedConfig:
    """The config with what stock classes know nothing of, under a name that they refuse."""
    model_type = PREFIX + config.model_type.removeprefix(PREFIX)
    named = {"model_type": model_type, "architectures": [model_class(model_type).__name__]}
    return config_class_of(model_type).from_dict(config.to_dict() | named | more)


@cache
def config_class_of(model_type: str) -> type[PreTrainedConfig]:
    """The config class of a supported model type: transformers' own, or its pruned subclass."""
    stock = CONFIG_MAPPING[model_type.removeprefix(PREFIX)]
    if not model_type.startswith(PREFIX):
        return stock
    return type(f"Loram{stock.__name__}", (stock,), {"model_type": model_type})


@cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a supported model type: transformers' own, or its pruned subclass."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[config_class_of(model_type.removeprefix(PREFIX))]
    if not model_type.startswith(PREFIX):
        return stock

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        if hasattr(config, "survivors"):
            _compress_(self, config.survivors, config.survivors_nf4)
        if hasattr(config, "kept_kv_heads"):
            _shrink_(self, config.kept_kv_heads, config.kept_neurons)
        for name, rank in getattr(config, "stand_ins", {}).items():
            stand_in_(self.get_submodule(name), config.hidden_size, rank)

    body = {"__init__": __init__, "config_class": config_class_of(model_type)}
    return type(f"Loram{stock.__name__}", (stock,), body)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` (full or pruned) with shapes and no storage."""
    with torch.device("meta"):
        return model_class(config.model_type)(config)


def _shrink_(model: PreTrainedModel, kv_heads: list[int], neurons: list[int]) -> None:
    """Give every layer's linears their pruned widths, empty: `from_pretrained` fills them.

    Attention reshapes with -1 heads, and whole KV groups were removed, so the stock forward pass
    runs on the smaller projections as it is.
    """
    for layer, *left in zip(model.model.layers, kv_heads, neurons, strict=True):
        kept = widths(model.config, *left)
        for name, (dim, what) in LINEARS.items():
            old = layer.get_submodule(name)
            shape = [old.out_features, old.in_features]
            shape[dim] = kept[what]
            new = nn.Linear(
                shape[1],
                shape[0],
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            layer.set_submodule(name, new)


def _compress_(model: PreTrainedModel, survivors: dict[str, int], nf4: bool) -> None:
    """Replace linears by compressed ones, empty."""
    for name, count in survivors.items():
        old = model.get_submodule(name)
        bias = old.bias is not None
        new = CompressedLinear(old.in_features, old.out_features, bias, count, nf4)
        model.set_submodule(name, new.to(old.weight.device))
