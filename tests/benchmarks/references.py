"""The deciding classes of SparseGPT, Wanda and LLM-Pruner, from checkouts that are never copied.

DIR of `--references DIR` holds checkouts, named as the repositories, of IST-DASLab/sparsegpt,
locuslab/wanda and horseee/LLM-Pruner on GitHub, at the commits below.

Their drivers are written for the transformers of 2023 and for CUDA. What runs here unchanged are
the classes that decide: `SparseGPT`, `WrappedGPT`, `TaylorImportance`; the loop over layers below
hands them what their own would. What they needed: `torch.cuda.synchronize` to do nothing;
LLM-Pruner's `__init__` not to run (it wants sentencepiece for a model that is not used here); the
groups that LLM-Pruner finds by tracing to be written down. Of Wanda, the rule that turns the
metric into zeros is part of its driver and written anew.
"""

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loram.errors import refuse
from loram.kept import head_dim
from loram.layers import Layers
from loram.loss import Batch, CausalLoss
from loram.model import load
from loram.prune import PruneConfig, pattern
from loram.sparse import SHARED
from loram.taylor import Scores

COMMITS = {
    "sparsegpt": "147d2159dc4f3e9f73e47b32c04d7b3708f44436",
    "wanda": "8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6",
    "LLM-Pruner": "128a07d977f9b205d60ab14cfbc6a78f8a8e39d2",
}
# From a linear and what to remove: a forward hook that gathers, and the pruning itself.
Decide = Callable[[nn.Linear, PruneConfig], tuple[Callable, Callable[[], None]]]


def layerwise(
    base: Path, config: PruneConfig, rows: list[Batch], decide: Decide
) -> PreTrainedModel:
    """The loop over layers that SparseGPT and Wanda share."""
    model, layers = load(base), Layers(base)
    with torch.no_grad():
        hidden = list(layers.embedded(rows))
        for i in range(len(layers)):
            layer = layers.layer(i)
            hidden = prune_layer(layers, i, layer, hidden, rows, config, decide)
            model.model.layers[i].load_state_dict(layer.state_dict())
    return model


def prune_layer(
    layers: Layers,
    i: int,
    layer: nn.Module,
    hidden: list[Tensor],
    rows: list[Batch],
    config: PruneConfig,
    decide: Decide,
) -> list[Tensor]:
    """Inputs of all seven linears, prune them, then the layer's outputs."""
    hooks, finish = [], []
    for name in (name for names in SHARED for name in names):
        add, end = decide(layer.get_submodule(name), config)
        hooks.append(layer.get_submodule(name).register_forward_hook(add))
        finish.append(end)
    given = [layers.arguments(i, h, b) for h, b in zip(hidden, rows, strict=True)]
    for h, arguments in zip(hidden, given, strict=True):
        layer(h, **arguments)
    for hook in hooks:
        hook.remove()
    for end in finish:
        end()
    for weight in layer.parameters():
        weight.copy_(weight.bfloat16())
    return [layer(h, **arguments) for h, arguments in zip(hidden, given, strict=True)]


def sparsegpt(references: Path) -> Decide:
    """`SparseGPT` of one linear."""
    module = _imported(references / "sparsegpt", "sparsegpt")
    torch.cuda.synchronize = lambda *_: None

    def decide(linear: nn.Linear, config: PruneConfig) -> tuple:
        gpt, removed = module.SparseGPT(linear), pattern(config)

        def end() -> None:
            share = 0 if removed.group else removed.ratio
            with contextlib.redirect_stdout(io.StringIO()):
                gpt.fasterprune(share, removed.zeros, removed.group)
            gpt.free()

        return (lambda _, inputs, out: gpt.add_batch(inputs[0], out)), end

    return decide


def wanda(references: Path) -> Decide:
    """`WrappedGPT` of one linear; its rule: the lowest |W| * norm of each row, or of each group."""
    module = _imported(references / "wanda", "lib.layerwrapper")

    def decide(linear: nn.Linear, config: PruneConfig) -> tuple:
        wrapped, removed = module.WrappedGPT(linear), pattern(config)

        def end() -> None:
            weight = linear.weight.data
            metric = weight.abs() * wrapped.scaler_row.sqrt()
            count = int(weight.shape[1] * removed.ratio)
            if removed.group:
                metric, count = metric.unflatten(1, (-1, removed.group)), removed.zeros
            lowest = metric.sort(dim=-1, stable=True).indices[..., :count]
            gone = torch.zeros_like(metric, dtype=torch.bool).scatter(-1, lowest, True)
            weight[gone.view_as(weight)] = 0

        return (lambda _, inputs, out: wrapped.add_batch(inputs[0], out)), end

    return decide


def llm_pruner_scores(base: Path, rows: list[Batch], references: Path) -> Scores:
    """`TaylorImportance` (param_first, sum) on the gradients of the whole model, in float32."""
    checkout = references / "LLM-Pruner"
    hollow = sys.modules["LLMPruner"] = ModuleType("LLMPruner")
    hollow.__path__ = [str(checkout / "LLMPruner")]
    tp = _imported(checkout, "LLMPruner.torch_pruning")
    pruner = _imported(checkout, "LLMPruner.pruner.hf_llama_pruner")
    model = load(base, dtype=torch.float32)
    loss_of = CausalLoss(model)
    for b in rows:
        loss_of(b["input_ids"], b["labels"], b["position_ids"]).backward()
    importance = pruner.TaylorImportance(group_reduction="sum", taylor="param_first")
    out, into = tp.prune_linear_out_channels, tp.prune_linear_in_channels

    def group(*members: tuple[nn.Linear, Callable]) -> Tensor:
        listed = []
        for linear, handler in members:
            target = type("Target", (), {"module": linear})
            width = linear.out_features if handler is out else linear.in_features
            dependency = type("Dependency", (), {"target": target, "handler": handler})
            listed.append((dependency, list(range(width))))
        return importance(listed)

    heads, neurons = [], []
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        channels = group(
            (attn.k_proj, out), (attn.v_proj, out), (attn.q_proj, out), (attn.o_proj, into)
        )
        heads.append(channels.view(-1, head_dim(model.config)).sum(1))
        neurons.append(group((mlp.gate_proj, out), (mlp.up_proj, out), (mlp.down_proj, into)))
    return Scores(torch.stack(heads).detach(), torch.stack(neurons).detach())


def _imported(directory: Path, module: str) -> ModuleType:
    """A module of a checkout, under its own name.

    Raises:
        UserError: the checkout is not at the commit that results are of.
    """
    head = subprocess.run(
        ["git", "-C", directory, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    found = head.stdout.strip() or "no commit"
    if found != COMMITS[directory.name]:
        refuse("--references", f"{directory} at {found}", COMMITS[directory.name])
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(directory))
