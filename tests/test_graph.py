"""Which steps a recipe asks for, and which of its settings reach each."""

from pipelines.graph import build
from pipelines.locate import all_sources
from pipelines.recipes import resolve
from pipelines.step import Source, Step, order


def steps(*changes: str) -> dict[str, Step]:
    """The steps of the recipe for tests with these changes, by name."""
    recipe = resolve("test", list(changes))
    sources = {spec.path: Source("data", spec.path, spec.path) for spec in all_sources(recipe)}
    graph = build(recipe, Source("model", recipe.model, "digest"), sources)
    return {step.name: step for step in order([v.evaluate for v in graph.variants])}


def test_only_the_small_model_has_masks():
    """LoRA and QLoRA on the full model are the same with `adapter.masked` as without it."""
    plain, masked = (
        steps("prune.method=semi", 'compare=["lora","qlora"]', f"adapter.masked={value}")
        for value in ("false", "true")
    )
    assert masked["sft"].config.adapter.masked
    for name in plain:
        changed = name in ("sft", "recover", "evaluate_small", "evaluate_large")
        assert (plain[name].key != masked[name].key) == changed
