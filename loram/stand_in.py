"""A low-rank stand-in for what was removed from a sub-block: (x P) Q is added to its output.

Frozen while an adapter trains, and dropped at recovery: the full model does that part itself.
`loram.compensate` finds P and Q.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class StandIn(nn.Module):
    """x (..., hidden) -> (x P) Q, with P (hidden, rank) and Q (rank, hidden).

    Plain parameters and no `nn.Linear`, so that neither NF4 nor LoRA takes hold of them.
    """

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.empty(hidden, rank))
        self.Q = nn.Parameter(torch.empty(rank, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.P @ self.Q


class StandInFound(NamedTuple):
    """P (hidden, rank) and Q (rank, hidden) of the sub-block of that name, in the dtype of the
    small model, and the share that they leave of what was missing."""

    name: str
    p: Tensor
    q: Tensor
    left: float


def stand_in_(block: nn.Module, hidden: int, rank: int) -> None:
    """Give an attention or MLP module an empty stand-in, `stand_in`, which acts from now on."""
    block.stand_in = StandIn(hidden, rank)
    block.register_forward_hook(_beside, with_kwargs=True)


def blocks_to_fill(cut: Iterable[str]) -> list[str]:
    """Attention and MLP, `model.layers.<i>.self_attn` and `.mlp`, of every layer of which a
    linear was cut; both, for behind a cut attention also a whole MLP gets another input."""
    layers = sorted({int(name.split(".")[2]) for name in cut})
    return [f"model.layers.{i}.{block}" for i in layers for block in ("self_attn", "mlp")]


def _beside(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | tuple[Any, ...]:
    added = block.stand_in(args[0] if args else kwargs["hidden_states"])
    if isinstance(output, tuple):  # attention also returns its weights
        return output[0] + added, *output[1:]
    return output + added
