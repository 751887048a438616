"""The method as a graph: a recipe and the digests of its sources in, steps out."""

from dataclasses import dataclass, replace
from functools import partial

from pipelines import steps
from pipelines.corpus import CorpusConfig, InstructConfig, build_corpus, build_instruct
from pipelines.recipe import Recipe
from pipelines.sources import SourceSpec
from pipelines.step import Source, Step


@dataclass(frozen=True)
class Variant:
    """A row of the table: its evaluation and, where one was trained, its SFT and frozen model."""

    label: str
    evaluate: Step
    sft: Step | None = None
    frozen: Step | Source | None = None


@dataclass(frozen=True)
class Graph:
    """What a recipe asks for: the rows of its table, and the adapter that it is all about."""

    variants: tuple[Variant, ...]
    pruned: Step
    recovered: Step


def build(recipe: Recipe, model: Source, sources: dict[str, Source]) -> Graph:
    """The steps of `recipe`.

    Args:
        model: the full model.
        sources: each data source by its path.
    """
    place = recipe.place
    # Training runs in the workers of its own Ray Train job: the step that starts them needs no CPU.
    light = partial(Step, cpus=0)
    heavy = partial(Step, cpus=place.cpus_per_worker, gpus=place.gpus_per_worker)

    def inputs(chosen: tuple[SourceSpec, ...]) -> dict[str, Source]:
        return {f"source{i}": sources[spec.path] for i, spec in enumerate(chosen)}

    corpus = light(
        "corpus",
        build_corpus,
        CorpusConfig.of(recipe.corpus, recipe.align.seq_len),
        {"tokenizer": model} | inputs(recipe.corpus.sources),
    )
    instruct = light(
        "instruct",
        build_instruct,
        InstructConfig.of(recipe.instruct, recipe.sft.seq_len),
        {"tokenizer": model} | inputs(recipe.instruct.sources),
    )

    def held_out(name: str, chosen: tuple[SourceSpec, ...]) -> Step:
        config = InstructConfig.of(
            replace(recipe.instruct, sources=chosen, rows=None, held_out=recipe.evaluate.rows),
            recipe.sft.seq_len,
        )
        return light(name, build_instruct, config, {"tokenizer": model} | inputs(chosen))

    in_domain = instruct
    if recipe.evaluate.in_domain:
        in_domain = held_out("in_domain", recipe.evaluate.in_domain)
    out_of_domain = held_out("out_of_domain", recipe.evaluate.out_of_domain)

    random = recipe.prune.method == "rand"
    scores = heavy(
        "score",
        steps.score,
        steps.ScoreConfig(
            recipe.prune.method,
            recipe.prune.seed if random else 0,
            0 if random else recipe.calibration_rows,
        ),
        {"model": model} if random else {"model": model, "corpus": corpus},
    )
    pruned = Step("prune", steps.prune, recipe.prune, {"model": model, "scores": scores})
    small: Step = pruned
    if recipe.align.steps:
        aligned = {"pruned": pruned, "corpus": corpus}
        small = light("align", steps.align, recipe.align, aligned)
    if recipe.nf4:
        small = heavy("quantise", steps.quantise, steps.Empty(), {"model": small})

    def sft(name: str, frozen: Step | Source) -> Step:
        config = steps.SftConfig(recipe.sft, recipe.adapter)
        return light(name, steps.sft, config, {"model": frozen, "instruct": instruct})

    def evaluate(name: str, frozen: Step | Source, adapter: Step | None = None) -> Step:
        given = {"model": frozen, "in_domain": in_domain, "out_of_domain": out_of_domain}
        if adapter:
            given["adapter"] = adapter
        return heavy(f"evaluate_{name}", steps.evaluate, steps.Empty(), given)

    variants = [Variant("base", evaluate("base", model))]
    if "lora" in recipe.compare:
        lora = sft("sft_lora", model)
        variants.append(Variant("LoRA", evaluate("lora", model, lora), lora, model))
    if "qlora" in recipe.compare:
        nf4 = heavy("quantise_full", steps.quantise, steps.Empty(), {"model": model})
        qlora = sft("sft_qlora", nf4)
        variants.append(Variant("QLoRA", evaluate("qlora", nf4, qlora), qlora, nf4))
    adapter = sft("sft", small)
    recovered = Step(
        "recover",
        steps.recover,
        steps.Empty(),
        {"adapter": adapter, "pruned": pruned, "base": model},
    )
    ours = "QLoRAM" if recipe.nf4 else "LoRAM"
    ours += "-" + recipe.prune.method.capitalize()
    variants += [
        Variant(f"{ours}, small", evaluate("small", small, adapter), adapter, small),
        Variant(f"{ours}, large", evaluate("large", model, recovered), adapter, small),
    ]
    return Graph(tuple(variants), pruned, recovered)
