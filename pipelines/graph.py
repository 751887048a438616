"""The method as a graph: a recipe and the digests of its sources in, steps out."""

from dataclasses import dataclass, replace
from functools import partial

from loram.prune import STRUCTURED
from pipelines import imitate, steps
from pipelines.corpus import build_corpus, build_instruct
from pipelines.recipe import Recipe
from pipelines.sample import CorpusConfig, InstructConfig, readings
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
    """What a recipe asks for: the rows of its table, and the adapter that it is all about.

    untrained: the small model without an adapter, which only a study looks at.
    """

    variants: tuple[Variant, ...]
    pruned: Step
    recovered: Step
    untrained: Variant


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
        CorpusConfig(
            readings(recipe.corpus.sources, sources),
            recipe.corpus.rows,
            recipe.corpus.held_out,
            recipe.align.seq_len,
            recipe.corpus.max_bad_share,
            recipe.corpus.seed,
        ),
        {"tokenizer": model} | inputs(recipe.corpus.sources),
    )

    def conversations(
        name: str, chosen: tuple[SourceSpec, ...], rows: int | None, held_out: int
    ) -> Step:
        config = InstructConfig(
            readings(chosen, sources),
            rows,
            held_out,
            recipe.sft.seq_len,
            recipe.instruct.max_bad_share,
            recipe.instruct.seed,
        )
        return light(name, build_instruct, config, {"tokenizer": model} | inputs(chosen))

    rows, held_out = recipe.instruct.rows, recipe.instruct.held_out
    instruct = conversations("instruct", recipe.instruct.sources, rows, held_out)
    rows = recipe.evaluate.rows
    in_domain = instruct
    if recipe.evaluate.in_domain:
        in_domain = conversations("in_domain", recipe.evaluate.in_domain, rows, rows)
    out_of_domain = conversations("out_of_domain", recipe.evaluate.out_of_domain, rows, rows)

    sparse = recipe.prune.method not in STRUCTURED
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
    if sparse:
        sparsify = steps.SparsifyConfig(recipe.prune, recipe.calibration_rows)
        pruned = heavy("prune", steps.sparsify, sparsify, {"model": model, "corpus": corpus})
    small: Step = pruned
    if recipe.compensate.rank:
        data = {"corpus": corpus, "task": instruct}
        names = data if recipe.compensate.data == "both" else (recipe.compensate.data,)
        fitted: dict[str, Step | Source] = {data[name].name: data[name] for name in names}
        fitted |= {"model": model, "pruned": pruned}
        config = imitate.StandInsConfig(recipe.compensate, recipe.offset.every)
        small = heavy("compensate", imitate.compensate, config, fitted)
    if recipe.align.steps and recipe.distil.top:
        total = recipe.align.steps * recipe.align.global_batch
        wanted = imitate.TargetsConfig(
            recipe.distil.top, recipe.distil.hidden_layers, total, recipe.align.seed
        )
        targets = heavy(
            "targets", imitate.targets, wanted, {"model": model, "corpus": corpus}, version=2
        )
        distilled = imitate.DistilledConfig(recipe.align, recipe.distil)
        aligned = {"pruned": small, "corpus": corpus, "targets": targets}
        small = light("distil", imitate.distil, distilled, aligned)
    elif recipe.align.steps:
        aligned = {"pruned": small, "corpus": corpus}
        small = light("align", steps.align, recipe.align, aligned)
    if sparse:
        compression = steps.CompressConfig(recipe.nf4)
        small = heavy("compress", steps.compress, compression, {"model": small}, gpus=0)
    elif recipe.nf4:
        small = heavy("quantise", steps.quantise, steps.Empty(), {"model": small})

    def sft(name: str, frozen: Step | Source, kept: Step | None = None) -> Step:
        # Only the small model has masks.
        masked = recipe.adapter.masked and frozen is small
        config = steps.SftConfig(recipe.sft, replace(recipe.adapter, masked=masked))
        given: dict[str, Step | Source] = {"model": frozen, "instruct": instruct}
        given |= {"kept": kept} if kept else {}
        if recipe.offset.every and frozen is small:
            return in_parts(name, config, given)
        return light(name, steps.sft, config, given)

    def in_parts(name: str, config: steps.SftConfig, given: dict[str, Step | Source]) -> Step:
        """SFT with offsets: one training after another, each with those of its rows."""
        train, batch = config.train, config.train.global_batch
        found: list[Step] = []
        for first, end in recipe.offset.spans(train.steps):
            if first >= train.last:
                break
            earlier: dict[str, Step | Source] = {"earlier": found[-1]} if found else {}
            read: dict[str, Step | Source] = {"model": model, "small": small, "instruct": instruct}
            read |= earlier | {"pruned": pruned} if found else {}
            wanted = imitate.OffsetsConfig(
                recipe.offset.every,
                train.steps * batch,
                train.seed,
                first * batch,
                end * batch,
            )
            offsets = heavy("offsets", imitate.offsets, wanted, read)
            stop = train.stop if end == train.steps else min(end, train.last)
            part = replace(config, train=replace(train, stop=stop))
            found.append(light(name, steps.sft, part, given | earlier | {"offsets": offsets}))
        return found[-1]

    def evaluate(name: str, frozen: Step | Source, adapter: Step | None = None) -> Step:
        given = {"model": frozen, "in_domain": in_domain, "out_of_domain": out_of_domain}
        if adapter:
            given["adapter"] = adapter
        config = steps.EvaluateConfig(recipe.evaluate.answers)
        return heavy(f"evaluate_{name}", steps.evaluate, config, given)

    variants = [Variant("base", evaluate("base", model))]
    if "lora" in recipe.compare:
        lora = sft("sft_lora", model)
        variants.append(Variant("LoRA", evaluate("lora", model, lora), lora, model))
    if "bound" in recipe.compare:
        bound = sft("sft_bound", model, pruned)
        evaluated = evaluate("bound", model, bound)
        variants.append(Variant("LoRA where pruning keeps", evaluated, bound, model))
    if "qlora" in recipe.compare:
        nf4 = heavy("quantise_full", steps.quantise, steps.Empty(), {"model": model})
        qlora = sft("sft_qlora", nf4)
        variants.append(Variant("QLoRA", evaluate("qlora", nf4, qlora), qlora, nf4))
    adapter = sft("sft", small)
    parts: dict[str, Step | Source] = {"adapter": adapter, "pruned": pruned, "base": model}
    recovered = Step("recover", steps.recover, steps.Empty(), parts)
    ours = "QLoRAM" if recipe.nf4 else "LoRAM"
    ours += "-" + recipe.prune.method.capitalize()
    variants += [
        Variant(f"{ours}, small", evaluate("small", small, adapter), adapter, small),
        Variant(f"{ours}, large", evaluate("large", model, recovered), adapter, small),
    ]
    untrained = Variant(f"{ours}, untrained", evaluate("untrained", small), None, small)
    return Graph(tuple(variants), pruned, recovered, untrained)
