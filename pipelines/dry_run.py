"""`--dry-run`: the graph, sizes, memory and tokens of a recipe; nothing is run."""

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from loram import plan
from loram.errors import UserError
from loram.hub import split
from loram.model import read_config
from loram.train import TrainConfig
from pipelines import disk
from pipelines.check import check, check_space
from pipelines.gpu_memory import stages
from pipelines.graph import Graph, build
from pipelines.locate import all_sources, locate
from pipelines.recipe import Recipe
from pipelines.recipes import NAMED
from pipelines.settings import check_settings
from pipelines.shapes import SHAPES
from pipelines.step import Source, topological_order
from pipelines.store import Store


def dry_run(recipe: Recipe, store: Store) -> int:
    """Print the plan of a recipe; returns the exit status.

    A model or data that cannot be reached from here is said to be so: sizes then come from the
    published shape of the recipe's model, and keys are unknown.

    Raises:
        UserError: the recipe itself is wrong.
    """
    console = Console(highlight=False)
    try:
        config = check_settings(recipe, read_config(recipe.model))
        check(recipe, store.root)
        graph, problem = build(recipe, *locate(recipe, store.root / "digests")), ""
        check_space(store, recipe, config, [variant.evaluate for variant in graph.variants])
    except UserError as error:
        config = check_settings(recipe, known_config(recipe, error))
        unknown = {spec.path: Source("data", spec.path, "") for spec in all_sources(recipe)}
        graph, problem = build(recipe, Source("model", recipe.model, ""), unknown), str(error)
    console.print(_steps(graph, store, known=not problem))
    for table in (_sizes(recipe, config), _memory(recipe, config), _tokens(recipe)):
        console.print(table)
    if problem:
        console.print(f"not ready to run here: {problem}", markup=False, soft_wrap=True)
    return 0


def known_config(recipe: Recipe, error: UserError) -> PreTrainedConfig:
    """The model's own config if it can be read, else the published shape of a named recipe's."""
    try:
        return read_config(recipe.model)
    except UserError:
        if recipe.name not in SHAPES or split(recipe.model)[0] != NAMED[recipe.name]().model:
            raise error from None
        return SHAPES[recipe.name]


def _steps(graph: Graph, store: Store, known: bool) -> Table:
    table = Table("step", "key", "in the store", "needs", title="Steps")
    targets = [variant.evaluate for variant in graph.variants]
    for step in topological_order(targets):
        there = known and not store.flaw(step.slug, step.key)
        needs = ", ".join(dict.fromkeys(node.name for node in step.inputs.values()))
        shown = step.key[:12] if known else "unknown"
        table.add_row(step.name, shown, "yes" if there else "no", needs)
    return table


def _sizes(recipe: Recipe, config: PreTrainedConfig) -> Table:
    planned = plan.planned_config(config, recipe.prune, recipe.compensate.rank)
    full, small = plan.size(config), plan.size(planned)
    lora = plan.lora_parameters(planned, recipe.adapter)
    table = Table("", "parameters", "reduction", title="Sizes")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("full model", f"{full.total:,}", "1.00x")
    table.add_row("pruned", f"{small.total:,}", f"{full.total / small.total:.2f}x")
    quarter = f"{full.total / small.paper_nf4_parameters:.2f}x"
    table.add_row("pruned, NF4 as the paper counts it (parameters / 4)", "", quarter)
    honest = f"{full.bf16_bytes / small.nf4_bytes:.2f}x"
    table.add_row(
        "pruned, NF4 in bytes (4.127 bits; embeddings, head and norms in 16 bits)", "", honest
    )
    if small.stand_ins:
        table.add_row("of these, stand-ins for what was removed", f"{small.stand_ins:,}", "")
        kept = disk.compensate_bytes(recipe, config)
        table.add_row("stand-ins, bytes on disk at most, while they are fitted", f"{kept:,}", "")
    if recipe.distil.top:
        kept = disk.distil_bytes(recipe, config)
        table.add_row("the large model's targets, bytes on disk at most", f"{kept:,}", "")
    if recipe.offset.every:
        kept = disk.offsets_bytes(recipe, config)
        table.add_row("offsets, bytes on disk at most, while they are found", f"{kept:,}", "")
    table.add_row("the store, bytes on disk at most", f"{disk.run_bytes(recipe, config):,}", "")
    table.add_row("LoRA on the pruned model", f"{lora:,}", "")
    table.add_row(
        "pruned, bytes in bf16 / in NF4", f"{small.bf16_bytes:,} / {small.nf4_bytes:,}", ""
    )
    return table


def _memory(recipe: Recipe, config: PreTrainedConfig) -> Table:
    table = Table("stage", "GPU memory", title="Estimated peak memory a worker")
    table.columns[1].justify = "right"
    whole = {"inference with the full model in bf16": plan.size(config).bf16_bytes}
    for name, needed in (stages(recipe, config) | whole).items():
        table.add_row(name, f"{needed / 1e9:,.2f} GB")
    return table


def _tokens(recipe: Recipe) -> Table:
    table = Table("stage", "steps", "tokens at most", title="Tokens")

    def row(name: str, train: TrainConfig) -> None:
        tokens = train.steps * train.global_batch * train.seq_len
        table.add_row(name, str(train.steps), f"{tokens:,}")

    if recipe.compensate.rank:
        # One pass of the large model and of the small one; with gradients, and back.
        seq_len = max(recipe.align.seq_len, recipe.sft.seq_len)
        table.add_row("compensate", "-", f"{recipe.compensate.rows * seq_len:,}")
    if recipe.align.steps:
        row("distil" if recipe.distil.top else "align", recipe.align)
    if recipe.offset.every:
        table.add_row("offsets", "-", f"{disk.offset_positions(recipe):,}")
    row("sft", recipe.sft)
    for name in recipe.compare:
        row(f"sft_{name}", recipe.sft)
    return table
