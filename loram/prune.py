"""Structured pruning: choose the groups that stay, and slice a checkpoint shard by shard."""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from loram.errors import refuse
from loram.kept import Kept
from loram.model import local, pruned_config, read_config
from loram.taylor import Scores, random_scores, taylor_scores

METHODS = ("rand", "stru")
# What goes along unchanged when a model directory is written anew: its text side, what was kept.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "kept.safetensors",
)


@dataclass(frozen=True)
class PruneConfig:
    """What to remove.

    Attributes:
        method: `rand` (random groups) or `stru` (Taylor importance), paper section 3.1.
        ratio: share removed of the KV heads and neurons of every pruned layer, in [0, 1).
        keep_first, keep_last: decoder layers left whole at either end.
        multiple: neurons kept are rounded to the nearest multiple of this (64 suits a GPU).
        seed: of `rand`.
    """

    method: str = "stru"
    ratio: float = 0.65
    keep_first: int = 4
    keep_last: int = 2
    multiple: int = 1
    seed: int = 0


def score(
    source: PreTrainedModel, batches: Iterable[dict[str, Tensor]], config: PruneConfig
) -> Scores:
    """Importance of every group of the full model; `rand` looks at neither model nor batches."""
    if config.method == "rand":
        return random_scores(source.config, config.seed)
    return taylor_scores(source, batches)


def widths(config: PreTrainedConfig, prune: PruneConfig) -> tuple[int, int]:
    """KV heads and neurons that stay in a pruned layer, by the size rule of the authors' code.

    neurons = I - ceil(I * ratio); with grouped queries KV heads = K - int(K * ratio), with one
    query head a KV head int(K * (1 - ratio)). The ratio counts as the decimal that was written:
    in floats int(40 * (1 - 0.9)) is 3.

    Raises:
        UserError: unknown method, a ratio outside [0, 1), or nothing left of a layer.
    """
    if prune.method not in METHODS:
        refuse("prune.method", repr(prune.method), ", ".join(METHODS))
    if not 0 <= prune.ratio < 1:
        refuse("prune.ratio", prune.ratio, "a number in [0, 1)")
    ratio = Decimal(str(prune.ratio))
    heads, kv_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    if heads == kv_heads:
        kept_kv = int(kv_heads * (1 - ratio))
    else:
        kept_kv = kv_heads - int(kv_heads * ratio)
    neurons = size - math.ceil(size * ratio)
    if neurons < size:
        neurons = min(size, prune.multiple * math.floor(neurons / prune.multiple + 0.5))
    if kept_kv < 1 or neurons < 1:
        refuse(
            "prune.ratio",
            f"{prune.ratio}, which leaves {kept_kv} KV heads and {neurons} neurons of a layer",
            f"a ratio that leaves at least one of {kv_heads} and one of {size}",
        )
    return kept_kv, neurons


def choose(scores: Scores, config: PreTrainedConfig, prune: PruneConfig) -> Kept:
    """Keep the most important groups of every pruned layer; the same share in each."""
    kept_kv, kept_neurons = widths(config, prune)
    layers = config.num_hidden_layers
    pruned = range(prune.keep_first, layers - prune.keep_last)

    def top(row: Tensor, count: int, layer: int) -> Tensor:
        if layer not in pruned:
            count = len(row)
        return torch.argsort(row, descending=True, stable=True)[:count].sort().values

    return Kept(
        tuple(top(scores.kv_heads[i], kept_kv, i) for i in range(layers)),
        tuple(top(scores.neurons[i], kept_neurons, i) for i in range(layers)),
    )


def prune(source: str | Path, out: Path, kept: Kept) -> None:
    """Write the pruned copy of `source` (a directory or hub id) to `out`, one shard at a time.

    `out` becomes an ordinary model directory with `kept.safetensors` beside the weights. Weights
    keep their dtype; q/k/v biases follow their rows; nothing else of the model changes.
    """
    source, out = local(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(source)
    slices = kept.slices(config)
    index, total = {}, 0
    for shard in sorted(source.glob("model*.safetensors")):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                module, _, parameter = name.rpartition(".")
                tensor, cut = file.get_tensor(name), slices.get(module)
                if cut and (parameter == "weight" or cut.dim == 0):
                    tensor = cut.take(tensor)
                tensors[name] = tensor
                index[name] = shard.name
                total += tensor.numel() * tensor.element_size()
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if len(set(index.values())) > 1:
        listing = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2))
    pruned_config(config, kept).save_pretrained(out)
    copy_companions(source, out)
    kept.save(out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and kept indices to another directory."""
    for pattern in COMPANIONS:
        for file in Path(source).glob(pattern):
            shutil.copyfile(file, Path(out) / file.name)
