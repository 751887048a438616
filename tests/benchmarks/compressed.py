"""Time of a compressed linear against the dense frozen one: forward and backward at 2,048 tokens.

    python -m tests.benchmarks.compressed

bf16 inputs and weights, as in training; two shapes; 4:8 in bf16 and NF4, and 0.55 in NF4. Kinds
take turns within every round, so that another load on the machine hits all of them; the medians
over the rounds are compared, and the fastest.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from loram.compressed import CompressedLinear, stored
from loram.masks import packed
from tests.benchmarks import keep

TOKENS, ROUNDS = 2048, 11
SHAPES = [(2048, 2048), (2048, 5632)]
KINDS = {"n:m bf16": (0.5, False), "n:m nf4": (0.5, True), "0.55 nf4": (0.55, True)}


def main() -> None:
    """A line for every shape and kind."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        linears = {"dense": dense(weight)}
        for kind, (removed, nf4) in KINDS.items():
            linears[kind] = holes(weight, removed, nf4, grouped=kind.startswith("n:m"))
        x = torch.randn(TOKENS, inputs, dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(TOKENS, outputs, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {kind: [] for kind in linears}
        for _ in range(ROUNDS):
            for kind, linear in linears.items():
                began = time.perf_counter()
                linear(x).backward(gradient)
                times[kind].append(time.perf_counter() - began)
        medians = {kind: statistics.median(found) for kind, found in times.items()}
        for kind in KINDS:
            keep(
                "compressed",
                shape=f"{inputs} -> {outputs}",
                tokens=TOKENS,
                kind=kind,
                dense_ms=round(1e3 * medians["dense"], 1),
                compressed_ms=round(1e3 * medians[kind], 1),
                ratio=round(medians[kind] / medians["dense"], 2),
                ratio_of_fastest=round(min(times[kind]) / min(times["dense"]), 2),
            )


def dense(weight: Tensor) -> nn.Linear:
    """A frozen linear in bf16."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def holes(weight: Tensor, removed: float, nf4: bool, grouped: bool) -> CompressedLinear:
    """The same without a share of its weights, at random."""
    keep_first = torch.rand(weight.shape).unflatten(1, (-1, 8) if grouped else (1, -1)).argsort(-1)
    mask = (keep_first >= removed * keep_first.shape[-1]).flatten(1)
    linear = CompressedLinear(weight.shape[1], weight.shape[0], False, int(mask.sum()), nf4)
    linear.load_state_dict({"bits": packed(mask)} | stored_of(weight[mask], nf4))
    return linear


def stored_of(values: Tensor, nf4: bool) -> dict[str, Tensor]:
    """`loram.compressed.stored` without a module's name."""
    return {name.removeprefix("."): tensor for name, tensor in stored("", values, nf4).items()}


if __name__ == "__main__":
    main()
