"""The steps of the method: each reads input directories, calls loram and writes one directory.

Nothing here knows of Ray, MLflow or the graph. `corpus.py` has the steps that prepare data.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import loram.adapter
import loram.prune
from loram.adapter import AdapterConfig, open_adapted
from loram.evaluate import perplexity
from loram.model import load, local, read_config, save
from loram.packing import Packed, batches
from loram.plan import size
from loram.prune import PruneConfig, choose, copy_companions
from loram.taylor import Scores, random_scores, taylor_scores
from loram.train import TrainConfig
from pipelines.fit import fit
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
    packed = Packed(corpus / "train")
    rows = range(min(config.rows, packed.rows))
    full = load(model, dtype=torch.float32, device=place.device)
    with _autocast(place):
        scores = taylor_scores(full, batches(packed, rows, place.micro_batch))
    scores.save(out)
    return {"calibration_tokens": len(rows) * packed.seq_len}


def prune(
    config: PruneConfig, *, model: str, scores: Path, out: Path, work: Path, place: Place
) -> Metrics:
    """Cut the model by its scores; the pruned copy is an ordinary model directory."""
    full = read_config(model)
    kept = choose(Scores.load(scores), full, config)
    loram.prune.prune(model, out, kept)
    before, after = size(full).total, size(read_config(out)).total
    return {"parameters": before, "pruned_parameters": after, "reduction": before / after}


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
    return {"bytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}


def sft(
    config: SftConfig,
    *,
    model: Path | str,
    instruct: Path,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Train a LoRA adapter on the model as it is: small or full, 16-bit or NF4."""
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


def evaluate(
    config: Empty,
    *,
    model: Path | str,
    in_domain: Path,
    out_of_domain: Path,
    adapter: Path | None = None,
    out: Path,
    work: Path,
    place: Place,
) -> Metrics:
    """Loss in nats a trained token and perplexity on held-out rows, in and out of domain."""
    opened = (
        open_adapted(model, adapter, device=place.device)
        if adapter
        else load(model, device=place.device)
    )
    metrics: Metrics = {}
    for domain, path in (("in_domain", in_domain), ("out_of_domain", out_of_domain)):
        packed = Packed(path / "held_out")
        rows = batches(packed, range(packed.rows), place.micro_batch)
        found = perplexity(opened, rows)
        metrics |= {f"{domain}_{name}": value for name, value in found.items()}
    metrics["peak_memory_bytes"] = place.peak_memory()
    return metrics


def _autocast(place: Place) -> torch.autocast:
    return torch.autocast(place.device, dtype=torch.bfloat16)
