"""What a finished run showed: one row for each way to get a model."""

from dataclasses import dataclass, replace
from pathlib import Path

from loram.model import read_config
from loram.plan import Size, size
from pipelines.graph import Graph
from pipelines.step import Source, Step
from pipelines.store import Store

LEAST_GAIN = 0.2  # nats that full LoRA must gain before shares of its gain mean anything


@dataclass(frozen=True)
class Row:
    """One way to get a model: its evaluation, and what its training held and did.

    Attributes:
        parameters, bytes: of the frozen model while the adapter trained; None if none trained.
        loss: nats a trained token, held out, in-domain; perplexities: in domain, out of domain.
        tokens_per_second, peak_memory_bytes: of SFT.
        reduction: bytes of the full model in bf16 over `bytes`.
        share: of full LoRA's gain in `loss`; None where it cannot be told.
        score: share of held-out problems answered right; None if none was asked.
    """

    label: str
    loss: float
    perplexity: float
    out_of_domain_perplexity: float
    parameters: int | None = None
    bytes: int | None = None
    reduction: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    share: float | None = None
    score: float | None = None


def rows(graph: Graph, store: Store, full: Size) -> list[Row]:
    """A row for each variant of a finished graph, from the records of its steps; without what only
    entries knew that were removed since."""
    metrics = {v.label: store.record(v.evaluate.slug)["metrics"] for v in graph.variants}
    loss = {label: found["in_domain_loss"] for label, found in metrics.items()}
    found = []
    for v in graph.variants:
        row = Row(
            v.label,
            loss[v.label],
            metrics[v.label]["in_domain_perplexity"],
            metrics[v.label]["out_of_domain_perplexity"],
            score=metrics[v.label].get("strict_match"),
        )
        path: str | Path | None = v.frozen.uri if isinstance(v.frozen, Source) else None
        if isinstance(v.frozen, Step) and store.known(v.frozen.slug):
            path = store.entry(v.frozen.slug)
        if path:
            config = read_config(path)
            count = size(config)
            nf4 = getattr(config, "quantization_config", getattr(config, "survivors_nf4", False))
            held = count.nf4_bytes if nf4 else count.bf16_bytes
            reduction = full.bf16_bytes / held
            row = replace(row, parameters=count.total, bytes=held, reduction=reduction)
        if v.sft and (trained := store.known(v.sft.slug)):
            sft = trained["metrics"]
            row = replace(
                row,
                tokens_per_second=sft["tokens_per_second"],
                peak_memory_bytes=sft["peak_memory_bytes"],
            )
        if v.sft and loss.keys() >= {"base", "LoRA"}:
            share = share_of_gain(loss["base"], loss["LoRA"], loss[v.label])
            row = replace(row, share=share)
        found.append(row)
    return found


def headline(rows: list[Row]) -> dict[str, float]:
    """The final scores under the flat names that MLflow compares."""
    names = {"loss": "loss", "out_of_domain_perplexity": "ppl_out", "share": "share_of_gain"}
    names["score"] = "score"
    found = {}
    for row in rows:
        where = row.label.rpartition(", ")[2].lower()
        for attribute, name in names.items():
            value = getattr(row, attribute)
            if value is not None:
                found[f"{where}_{name}"] = value
    return found


def share_of_gain(base: float, lora: float, loss: float) -> float | None:
    """(base - loss) / (base - lora), or None when full LoRA gained under 0.2 nats."""
    return (base - loss) / (base - lora) if base - lora >= LEAST_GAIN else None
