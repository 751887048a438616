"""Perplexity after pruning, ours beside reference code on the same model, calibration, evaluation.

    python -m tests.benchmarks.pruning [--seeds 0 1 2] [--references DIR]

SmolLM2-135M; 32 x 512 tokens of C4 for calibration, other ones for each seed; 16 x 512 tokens of
held-out C4 (in domain) and of Wikipedia (out of domain) for evaluation; weights in bf16. DIR holds
checkouts named `sparsegpt`, `wanda` and `LLM-Pruner`:

    github.com/IST-DASLab/sparsegpt   147d2159dc4f3e9f73e47b32c04d7b3708f44436
    github.com/locuslab/wanda         8e8fc87b4a2f9955baa7e76e64d5fce7fa8724a6
    github.com/horseee/LLM-Pruner     128a07d977f9b205d60ab14cfbc6a78f8a8e39d2

Their drivers are written for the transformers of 2023 and for CUDA. What is used here unchanged are
the classes that decide: `SparseGPT`, `WrappedGPT`, `TaylorImportance`; the loop over layers below
hands them what their own would. `torch.cuda.synchronize` becomes nothing. Groups that LLM-Pruner
finds by tracing are written down, and it is asked for as many heads and neurons as ours keeps.

Cells that results.jsonl has are not run again.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loram.data import encode_text
from loram.evaluate import perplexity
from loram.kept import head_dim
from loram.layers import Layers
from loram.loss import Batch, CausalLoss
from loram.model import load, load_tokenizer, read_config
from loram.packing import Packed, batches, cut, write_packed
from loram.prune import PruneConfig, choose, pattern, prune, ratio
from loram.sparse import SHARED, sparsify
from loram.taylor import Scores, taylor_scores
from pipelines.assets import MODEL, home
from tests.benchmarks import RESULTS, keep

BASE = home() / "assets" / MODEL
SEQ_LEN, CALIBRATION, ROWS = 512, 32, 48
STRUCTURED = [PruneConfig("stru", share) for share in (0.2, 0.35, 0.5, 0.65)]
SPARSE = [PruneConfig("semi", pattern="2:4"), PruneConfig("semi"), PruneConfig("unst", 0.5)]
SPARSE.append(PruneConfig("unst", 0.55))


def main() -> None:
    """Run the missing cells, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--references", type=Path)
    options = parser.parse_args()
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    known = [json.loads(line) for line in lines]
    torch.cuda.synchronize = lambda *_: None
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for seed in options.seeds:
            for method, code, run in cells(options.references):
                what = method.pattern if method.method == "semi" else f"{ratio(method)}"
                cell = {"method": method.method, "removed": what, "code": code, "seed": seed}
                if any(cell.items() <= line.items() for line in known):
                    continue
                rows = text(root, "c4.jsonl", seed)
                began = time.perf_counter()
                model = run(method, list(batches(rows, range(CALIBRATION), 4)), root)
                seconds = time.perf_counter() - began
                found = {
                    domain: perplexity(model, batches(packed, range(CALIBRATION, ROWS), 4))
                    for domain, packed in (
                        ("in", text(root, "c4.jsonl", 99)),
                        ("out", text(root, "wiki.txt", 0)),
                    )
                }
                scores = {f"{k}_perplexity": round(v["perplexity"], 2) for k, v in found.items()}
                keep("pruning", **cell, **scores, seconds=round(seconds, 1))


Run = Callable[[PruneConfig, list[Batch], Path], PreTrainedModel]


def cells(references: Path | None) -> Iterator[tuple[PruneConfig, str, Run]]:
    """What to prune, whose code does it, and how."""
    yield PruneConfig("rand", 0.0), "loram", dense
    for config in STRUCTURED:
        yield config, "loram", ours
        if references:
            yield config, "LLM-Pruner", lambda c, b, r: llm_pruner(c, b, r, references)
    for config in SPARSE:
        yield config, "loram", ours
        if references:
            yield config, "SparseGPT", lambda c, b, r: layerwise(c, b, sparsegpt(references))
            yield config, "Wanda", lambda c, b, r: layerwise(c, b, wanda(references))


def text(root: Path, file: str, seed: int) -> Packed:
    """48 packed rows of a file's documents, from a place that the seed says; the last 16 are for
    evaluation, and no calibration of seeds 0 to 3 reads them."""
    where = root / f"{file}-{seed}"
    if not where.exists():
        lines = (home() / "assets" / file).read_text().splitlines()
        if file.endswith(".jsonl"):
            lines = [json.loads(line)["text"] for line in lines]
        tokenizer = load_tokenizer(BASE)
        documents = [encode_text(line, tokenizer) for line in lines if line.strip()]
        skip = len(documents) // 2 if seed == 99 else seed * len(documents) // 8
        rows = [row for row, _ in zip(cut(documents[skip:], SEQ_LEN), range(ROWS), strict=False)]
        write_packed(where, rows, seq_len=SEQ_LEN, pad_id=0)
    return Packed(where)


def dense(config: PruneConfig, rows: list[Batch], root: Path) -> PreTrainedModel:
    """The model as it is."""
    return load(BASE)


def ours(config: PruneConfig, rows: list[Batch], root: Path) -> PreTrainedModel:
    """LoRAM's own pruning; a Taylor score is taken once a seed and cut at every ratio."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        out = Path(name) / "pruned"
        if config.method == "stru":
            prune(BASE, out, choose(our_scores(rows, root), read_config(BASE), config))
        else:
            sparsify(BASE, out, rows, config)
        return load(out)


def our_scores(rows: list[Batch], root: Path) -> Scores:
    """Taylor scores for these rows, kept in `root`."""
    kept = root / f"scores-{int(rows[0]['input_ids'].sum())}"
    if not kept.exists():
        kept.mkdir()
        taylor_scores(BASE, rows).save(kept)
    return Scores.load(kept)


def layerwise(
    config: PruneConfig, rows: list[Batch], decide: Callable[[nn.Module, PruneConfig], tuple]
) -> PreTrainedModel:
    """The loop over layers that SparseGPT and Wanda share: inputs of all seven linears, prune,
    then the layer's outputs."""
    model, layers = load(BASE), Layers(BASE)
    with torch.no_grad():
        hidden = list(layers.embedded(rows))
        for i in range(len(layers)):
            layer = layers.layer(i)
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
            hidden = [layer(h, **arguments) for h, arguments in zip(hidden, given, strict=True)]
            model.model.layers[i].load_state_dict(layer.state_dict())
    return model


def sparsegpt(references: Path) -> Callable[[nn.Module, PruneConfig], tuple]:
    """The reference's class for one linear."""
    module = imported(references / "sparsegpt", "sparsegpt")

    def decide(linear: nn.Module, config: PruneConfig) -> tuple:
        gpt, removed = module.SparseGPT(linear), pattern(config)

        def end() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                gpt.fasterprune(
                    removed.ratio if not removed.group else 0, removed.zeros, removed.group
                )
            gpt.free()

        return (lambda _, inputs, out: gpt.add_batch(inputs[0], out)), end

    return decide


def wanda(references: Path) -> Callable[[nn.Module, PruneConfig], tuple]:
    """The reference's class for one linear; its rule: the lowest |W| * norm of a row, or group."""
    module = imported(references / "wanda", "lib.layerwrapper")

    def decide(linear: nn.Module, config: PruneConfig) -> tuple:
        wrapped, removed = module.WrappedGPT(linear), pattern(config)

        def end() -> None:
            weight = linear.weight.data
            metric = weight.abs() * wrapped.scaler_row.sqrt()
            if removed.group:
                metric = metric.unflatten(1, (-1, removed.group))
                count = removed.zeros
            else:
                count = int(weight.shape[1] * removed.ratio)
            lowest = metric.sort(-1, stable=True).indices[..., :count]
            weight[
                torch.zeros_like(metric, dtype=torch.bool).scatter(-1, lowest, True).view_as(weight)
            ] = 0

        return (lambda _, inputs, out: wrapped.add_batch(inputs[0], out)), end

    return decide


def llm_pruner(
    config: PruneConfig, rows: list[Batch], root: Path, references: Path
) -> PreTrainedModel:
    """Its importance of heads and neurons, cut by our `choose`: what differs is the ranking."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        scores = llm_pruner_scores(load(BASE, dtype=torch.float32), rows, references)
        out = Path(name) / "pruned"
        prune(BASE, out, choose(scores, read_config(BASE), config))
        return load(out)


def llm_pruner_scores(model: PreTrainedModel, rows: list[Batch], references: Path) -> Scores:
    """`TaylorImportance` (param_first, sum) on the whole model's gradients."""
    tp = imported(references / "LLM-Pruner", "LLMPruner.torch_pruning")
    pruner = imported(references / "LLM-Pruner", "LLMPruner.pruner.hf_llama_pruner")
    loss_of = CausalLoss(model)
    tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in rows)
    for b in rows:
        (loss_of(b["input_ids"], b["labels"], b["position_ids"]) / tokens).backward()
    importance = pruner.TaylorImportance(group_reduction="sum", taylor="param_first")
    out, into = tp.prune_linear_out_channels, tp.prune_linear_in_channels

    def group(*members: tuple[nn.Linear, Callable]) -> Tensor:
        def dependency(linear: nn.Linear, fn: Callable) -> object:
            target = type("Target", (), {"module": linear})
            return type("Dependency", (), {"target": target, "handler": fn})

        width = [m.out_features if fn is out else m.in_features for m, fn in members]
        listed = [
            (dependency(m, fn), list(range(w))) for (m, fn), w in zip(members, width, strict=True)
        ]
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


def imported(directory: Path, module: str):  # noqa: ANN201
    """A module of a checkout, under its own name."""
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(directory))


if __name__ == "__main__":
    main()
