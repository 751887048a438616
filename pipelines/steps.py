"""The steps of the method: each reads input directories, calls loram and writes one directory.

Nothing here knows of MLflow or of the graph, and of Ray only what `fit` does. `corpus.py` has the
steps that prepare data, `imitate.py` those that make the small model behave like the large one.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

import loram.adapter
import loram.prune
import loram.sparse
from loram.adapter import AdapterConfig, open_adapted
from loram.data import load_tokenizer
from loram.evaluate import perplexity, problems, strict_match
from loram.hub import local
from loram.model import load, read_config, save
from loram.packing import Packed, batches
from loram.plan import pruned_size, size
from loram.prune import PruneConfig, choose
from loram.shards import copy_companions
from loram.taylor import Scores, random_scores, taylor_scores
from loram.train import TrainConfig
from pipelines.fit import fit
from pipelines.imitate import calibration
from pipelines.place import Place
from pipelines.step import Metrics


@dataclass(frozen=True)
class ScoreConfig:
    """method, seed: as in `PruneConfig`. rows: packed corpus rows used for calibration."""

    method: str
    seed: int
    rows: int


@dataclass(frozen=True)
class SftConfig:
    """How an adapter is trained, and which."""

    train: TrainConfig
    adapter: AdapterConfig


@dataclass(frozen=True)
class Empty:
    """A step without settings."""


def score(
    config: ScoreConfig,
    *,
    model: str,
    corpus: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Importance of every KV group and neuron; random scores read neither model nor corpus."""
    if corpus is None:
        random_scores(read_config(model), config.seed).save(out)
        return {}
    rows, tokens = calibration(corpus, config.rows, place)
    options = {"work": place.spool(work), "device": place.device, "dtype": torch.bfloat16}
    scores = taylor_scores(model, rows, **options)
    scores.save(out)
    return {"calibration_tokens": tokens, "peak_memory_bytes": place.peak_memory()}


def prune(
    config: PruneConfig, *, model: str, scores: Path, out: Path, work: Path, place: Place
) -> Metrics:
    """Cut the model by its scores; the pruned copy is an ordinary model directory."""
    full = read_config(model)
    kept = choose(Scores.load(scores), full, config)
    loram.prune.prune(model, out, kept)
    before, after = size(full).total, size(read_config(out)).total
    return {
        "parameters": before,
        "pruned_parameters": after,
        "reduction": before / after,
        "peak_memory_bytes": place.peak_memory(),
    }


@dataclass(frozen=True)
class SparsifyConfig:
    """prune: what to remove. rows: packed corpus rows used for calibration."""

    prune: PruneConfig
    rows: int


def sparsify(
    config: SparsifyConfig, *, model: str, corpus: Path, out: Path, work: Path, place: Place
) -> Metrics:
    """Remove single weights by SparseGPT; the copy keeps its shapes, and its masks beside it."""
    rows, tokens = calibration(corpus, config.rows, place)
    options = {"work": place.spool(work), "device": place.device}
    found = loram.sparse.sparsify(model, out, rows, config.prune, **options)
    full = read_config(model)
    before, after = size(full).total, pruned_size(full, config.prune).total
    counts = {"parameters": before, "pruned_parameters": after, "reduction": before / after}
    used = {"calibration_tokens": tokens, "peak_memory_bytes": place.peak_memory()}
    return found | counts | used


@dataclass(frozen=True)
class CompressConfig:
    """nf4: quantise the survivors; else they stay in bf16."""

    nf4: bool


def compress(
    config: CompressConfig, *, model: Path, out: Path, work: Path, place: Place
) -> Metrics:
    """Keep only the survivors of a sparse model and a bit for each of its weights."""
    loram.sparse.compress(model, out, config.nf4)
    size = sum(file.stat().st_size for file in out.glob("model-*.safetensors"))
    return {"bytes": size, "peak_memory_bytes": place.peak_memory()}


def align(
    config: TrainConfig,
    *,
    pruned: Path,
    corpus: Path,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Continual pre-training of all kept weights on the general corpus (paper, section 3.2)."""
    return fit(
        "align",
        model=pruned,
        train=corpus / "train",
        held_out=corpus / "held_out",
        config=config,
        adapter=None,
        place=place,
        out=out,
        work=work,
    )


def quantise(config: Empty, *, model: Path | str, out: Path, work: Path, place: Place) -> Metrics:
    """NF4 with double quantisation, after alignment (paper, section 3.3)."""
    save(load(model, nf4=True, device=place.device), out)
    copy_companions(local(model), out)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {"bytes": size, "peak_memory_bytes": place.peak_memory()}


def sft(
    config: SftConfig,
    *,
    model: Path | str,
    instruct: Path,
    kept: Path | None = None,
    offsets: Path | None = None,
    earlier: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Train a LoRA adapter on the model as it is: small or full, 16-bit or NF4; with `kept`, a
    pruned model, on the full one at the positions that pruning keeps; with `offsets`, on the small
    one put where the full one is, in the first part or from where an `earlier` one ended."""
    return fit(
        "sft",
        model=Path(model),
        train=instruct / "train",
        held_out=instruct / "held_out",
        config=config.train,
        adapter=config.adapter,
        place=place,
        out=out,
        work=work,
        kept=kept,
        offsets=offsets,
        earlier=earlier,
    )


def recover(
    config: Empty,
    *,
    adapter: Path,
    pruned: Path,
    base: str,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Re-shape the adapter of the small model for the large one (paper, section 3.4)."""
    loram.adapter.recover(adapter, pruned, base, out)
    return {"bytes": sum(file.stat().st_size for file in out.iterdir())}


@dataclass(frozen=True)
class EvaluateConfig:
    """answers: in-domain problems to answer, 0 for none."""

    answers: int


def evaluate(
    config: EvaluateConfig,
    *,
    model: Path | str,
    in_domain: Path,
    out_of_domain: Path,
    adapter: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Loss in nats a trained token and perplexity on held-out rows, in and out of domain; if asked
    for, `strict_match`, the share of in-domain problems answered right, of `answered`."""
    device = "auto" if place.device == "cuda" else "cpu"  # a 70B model is more than a GPU holds
    opened = open_adapted(model, adapter, device=device) if adapter else load(model, device=device)
    metrics: Metrics = {}
    for domain, path in (("in_domain", in_domain), ("out_of_domain", out_of_domain)):
        packed = Packed(path / "held_out")
        rows = batches(packed, range(packed.rows), place.micro_batch)
        found = perplexity(opened, rows)
        metrics |= {f"{domain}_{name}": value for name, value in found.items()}
    if config.answers:
        asked = list(islice(problems(Packed(in_domain / "held_out")), config.answers))
        # A problem is shorter than a packed row.
        size = 4 * place.micro_batch
        metrics |= strict_match(opened, load_tokenizer(model), asked, size=size)
    metrics["peak_memory_bytes"] = place.peak_memory()
    return metrics
