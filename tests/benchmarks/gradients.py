"""How near the small model's gradients are to the large one's, by what its stand-ins are fitted on.

    python -m tests.benchmarks.gradients [--method stru] [--ratio 0.65] [--rank 64] [--rows 64]

Gradients of the loss at the residual stream after every layer behind which something was cut, on
held-out rows of the task, before any training; offsets put both models where the large one is.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from loram.compensate import CompensateConfig, compensate
from loram.loss import Batch, CausalLoss
from loram.model import load
from loram.offsets import OffsetLoss, Offsets, write_offsets
from loram.packing import Packed, batches
from pipelines.assets import home
from pipelines.cluster import start_ray
from pipelines.execute import execute
from pipelines.graph import build
from pipelines.launch import ray_launch
from pipelines.locate import locate
from pipelines.recipes import resolve
from pipelines.step import topological_order
from pipelines.store import Store
from tests.benchmarks import keep

HELD_OUT = 8  # rows


def main() -> None:
    """A line for no stand-ins, those fitted on values and those fitted on gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("stru", "rand"), default="stru")
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    changes = [f"prune.method={options.method}", f"prune.ratio={options.ratio}"]
    recipe, store = resolve("small", changes), Store(home() / "store")
    graph = build(recipe, *locate(recipe, store.root / "digests"))
    steps = {step.name: step for step in topological_order([graph.recovered])}
    start_ray()
    made = execute(
        [steps["prune"], steps["instruct"]], store, ray_launch, recipe.place, lambda event: None
    )
    pruned, instruct = made[steps["prune"].key], made[steps["instruct"].key]
    held_out = list(batches(Packed(instruct / "held_out"), range(HELD_OUT), 4))
    large = load(recipe.model)
    layers = large.config.num_hidden_layers
    true = [gradients(large, CausalLoss(large), batch, {}) for batch in held_out]
    differ = layers - recipe.prune.keep_last - 1
    for way in ("none", "values", "gradients"):
        with TemporaryDirectory() as name:
            small, seconds = pruned, 0.0
            if way != "none":
                started, small = time.monotonic(), Path(name) / "small"
                fitted = batches(Packed(instruct / "train"), range(options.rows), 4)
                config = CompensateConfig(options.rank, gradients=way == "gradients")
                compensate(
                    recipe.model,
                    pruned,
                    small,
                    fitted,
                    config,
                    offsets=range(1, layers + 1),
                    dtype=torch.bfloat16,
                )
                seconds = time.monotonic() - started
            found = anchored(recipe.model, small, Path(name), held_out)
        whole = [
            torch.cat([g.flatten() for batch in side for g in batch[:differ]])
            for side in (found, true)
        ]
        keep(
            "gradients",
            **vars(options),
            way=way,
            cosine=round(float(torch.cosine_similarity(*whole, dim=0)), 3),
            length=round(float(whole[0].norm() / whole[1].norm()), 3),
            seconds=round(seconds, 1),
        )


def anchored(source: str, small: Path, work: Path, held_out: list[Batch]) -> list[list[Tensor]]:
    """Of each batch the gradients of the small model with offsets."""
    options = {"work": work / "work", "dtype": torch.bfloat16}
    write_offsets(source, small, work / "offsets", held_out, 1, **options)
    offsets, model = Offsets(work / "offsets"), load(small)
    module = OffsetLoss(model, offsets.layers)
    return [gradients(model, module, batch, offsets.fetch(batch["row"])) for batch in held_out]


def gradients(model: nn.Module, module: CausalLoss, batch: Batch, offsets: Batch) -> list[Tensor]:
    """Of the summed loss at the stream after every layer, (b, T, hidden) each."""
    streams: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: streams.append(output))
        for layer in model.model.layers
    ]
    embed = model.model.embed_tokens
    hooks.append(
        embed.register_forward_hook(lambda layer, args, x: x.detach().requires_grad_(True))
    )
    given = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(**given, **offsets)
    for hook in hooks:
        hook.remove()
    return list(torch.autograd.grad(loss, streams))


if __name__ == "__main__":
    main()
