"""What is pruned: the choice of groups and of patterns; structured pruning, layer by layer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from loram.errors import refuse
from loram.kept import Kept
from loram.loss import Batch
from loram.model import check_full, read_config
from loram.pruned import pruned_config
from loram.shards import Checkpoint, finite, write_part, write_rest
from loram.sparsegpt import BLOCK, Pattern
from loram.taylor import Scores, random_scores, taylor_scores

METHODS = ("rand", "stru", "semi", "unst")
STRUCTURED = ("rand", "stru")
RATIOS = {"rand": 0.65, "stru": 0.65, "unst": 0.55}  # of the paper's 13B experiments


@dataclass(frozen=True)
class PruneConfig:
    """What to remove.

    Attributes:
        method: paper section 3.1. `rand` (random groups) and `stru` (Taylor importance) remove KV
            groups and neurons; `semi` (n:m) and `unst` remove single weights by SparseGPT.
        ratio: share removed: of the KV heads and neurons of every pruned layer, or of the weights
            of every linear. None: the paper's, 0.65 by groups, n / m for semi, 0.55 for unst.
        pattern: of `semi`, zeros:group, such as 4:8 or 2:4.
        keep_first, keep_last: decoder layers that `rand` and `stru` leave whole at either end.
        multiple: `rand` and `stru` round the neurons kept to a multiple of it (64 suits a GPU).
        seed: of `rand`.
    """

    method: str = "stru"
    ratio: float | None = None
    pattern: str = "4:8"
    keep_first: int = 4
    keep_last: int = 2
    multiple: int = 1
    seed: int = 0


def ratio(config: PruneConfig) -> float:
    """The share that is removed: the one that was set, or the method's own.

    Raises:
        UserError: unknown method, a malformed pattern, or a ratio that the method cannot have.
    """
    if config.method not in METHODS:
        refuse("prune.method", repr(config.method), ", ".join(METHODS))
    if config.method == "semi":
        zeros, group = _zeros_and_group(config.pattern)
        if config.ratio not in (None, zeros / group):
            refuse("prune.ratio", config.ratio, f"{zeros / group}, which is {config.pattern}")
        return zeros / group
    found = RATIOS[config.method] if config.ratio is None else config.ratio
    if not 0 <= found < 1:
        refuse("prune.ratio", found, "a number in [0, 1)")
    return found


def pattern(config: PruneConfig) -> Pattern:
    """What `semi` or `unst` removes; errors as of `ratio`."""
    if config.method == "semi":
        return Pattern(ratio(config), *_zeros_and_group(config.pattern))
    return Pattern(ratio(config))


def _zeros_and_group(text: str) -> tuple[int, int]:
    zeros, _, group = text.partition(":")
    if not (zeros.isdigit() and group.isdigit() and 0 < int(zeros) < int(group) <= BLOCK):
        refuse("prune.pattern", repr(text), "zeros:group, such as 4:8 or 2:4")
    return int(zeros), int(group)


def score(
    source: str | Path, batches: Iterable[Batch], config: PruneConfig, **options: Any
) -> Scores:
    """Importance of every group of the full model; `rand` looks at neither weights nor batches.

    Options are those of `taylor_scores`.

    Raises:
        UserError: a method that does not prune groups; `loram.sparse.sparsify` does semi and unst.
    """
    _check_structured(config)
    if config.method == "rand":
        return random_scores(read_config(source), config.seed)
    return taylor_scores(source, batches, **options)


def kept_counts(config: PreTrainedConfig, pruning: PruneConfig) -> tuple[int, int]:
    """KV heads and neurons that stay in a pruned layer, by the size rule of the authors' code.

    neurons = I - ceil(I * ratio); with grouped queries KV heads = K - int(K * ratio), with one
    query head a KV head int(K * (1 - ratio)). The ratio counts as the decimal that was written:
    in floats int(40 * (1 - 0.9)) is 3.

    Raises:
        UserError: a method that does not prune groups, a ratio outside [0, 1), or nothing left of a
            layer.
    """
    share = Decimal(str(ratio(pruning)))
    _check_structured(pruning)
    heads, kv_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
    )
    if heads == kv_heads:
        kept_kv = int(kv_heads * (1 - share))
    else:
        kept_kv = kv_heads - int(kv_heads * share)
    neurons = size - math.ceil(size * share)
    if kept_kv < 1 or neurons < 1:
        refuse(
            "prune.ratio",
            f"{share}, which leaves {kept_kv} KV heads and {neurons} neurons of a layer",
            f"a ratio that leaves at least one of {kv_heads} and one of {size}",
        )
    if neurons == size:
        return kept_kv, neurons
    rounded = pruning.multiple * math.floor(neurons / pruning.multiple + 0.5)
    if not rounded:
        found = f"{pruning.multiple}, to which {neurons} neurons round to none"
        refuse("prune.multiple", found, f"1 to {2 * neurons}")
    return kept_kv, min(size, rounded)


def _check_structured(config: PruneConfig) -> None:
    if config.method not in STRUCTURED:
        refuse("prune.method", repr(config.method), ", ".join(STRUCTURED))


def choose(scores: Scores, config: PreTrainedConfig, pruning: PruneConfig) -> Kept:
    """Keep the most important groups of every pruned layer; the same share in each.

    Args:
        config: of the full model.

    Raises:
        UserError: as of `kept_counts`, or every layer is left whole.
    """
    kept_kv, kept_neurons = kept_counts(config, pruning)
    layers, ends = config.num_hidden_layers, (pruning.keep_first, pruning.keep_last)
    if min(ends) < 0 or sum(ends) >= layers:
        room = f"two numbers from 0 with a sum under the model's {layers} layers"
        refuse("prune.keep_first + prune.keep_last", f"{ends[0]} + {ends[1]}", room)
    pruned = range(pruning.keep_first, layers - pruning.keep_last)

    def top(row: Tensor, count: int, layer: int) -> Tensor:
        if layer not in pruned:
            count = len(row)
        return torch.argsort(row, descending=True, stable=True)[:count].sort().values

    return Kept(
        tuple(top(scores.kv_heads[i], kept_kv, i) for i in range(layers)),
        tuple(top(scores.neurons[i], kept_neurons, i) for i in range(layers)),
    )


def prune(source: str | Path, out: Path, kept: Kept) -> None:
    """Write the pruned copy of `source` (a directory or hub id) to `out`, layer by layer.

    `out` becomes an ordinary model directory with `kept.safetensors` beside the weights. Weights
    keep their dtype; q/k/v biases follow their rows; nothing else of the model changes.

    Raises:
        UserError: `source` is pruned, compressed or quantised.
        ValueError: NaN or Inf in a weight (named).
    """
    config = read_config(source)
    check_full(config, source)
    checkpoint, out = Checkpoint(source), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    slices = kept.slices(config)
    for part in checkpoint.parts():
        tensors = checkpoint.tensors(part)
        for name, tensor in tensors.items():
            module, _, parameter = name.rpartition(".")
            finite(tensor, name)
            cut = slices.get(module)
            if cut and (parameter == "weight" or cut.dim == 0):
                tensors[name] = cut.take(tensor)
        write_part(out, part, tensors)
    write_rest(out, pruned_config(config, kept), checkpoint.path)
    kept.save(out)
