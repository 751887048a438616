"""The named recipes, and how a run's recipe is made of a name and `key=value` changes."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from loram.adapter import AdapterConfig
from loram.compensate import CompensateConfig
from loram.errors import refuse
from loram.offsets import OffsetConfig
from loram.prune import PruneConfig, ratio
from loram.train import TrainConfig
from pipelines.assets import MODEL, TINY, home
from pipelines.place import Place
from pipelines.recipe import Corpus, Evaluate, Instruct, Recipe, changed, parsed
from pipelines.sources import SourceSpec


def asset(name: str) -> str:
    """The path of something that `make assets` prepared."""
    return str(home() / "assets" / name)


def small() -> Recipe:
    """The default: SmolLM2-135M, real text and instructions, some twenty minutes on two cores."""
    return Recipe(
        name="small",
        model=asset(MODEL),
        corpus=Corpus(
            (SourceSpec(asset("c4.jsonl"), weight=4.0), SourceSpec(asset("wiki.txt"))),
            rows=150,
            held_out=16,
        ),
        instruct=Instruct((SourceSpec(asset("gsm_train.jsonl")),), held_out=64),
        evaluate=Evaluate(
            in_domain=(SourceSpec(asset("gsm_test.jsonl")),),
            out_of_domain=(SourceSpec(asset("alpaca.jsonl")),),
            rows=100,
        ),
        calibration_rows=16,
        # What kept most of full LoRA's gain; alignment, which moves weights, loses of it.
        compensate=CompensateConfig(rank=64, gradients=True),
        offset=OffsetConfig(every=1, parts=2),
        align=TrainConfig(steps=0, lr=5e-5, global_batch=4, warmup_steps=4, eval_every=10),
        # A CPU takes a third of a step to draw dropout's masks, and no row is seen twice.
        adapter=AdapterConfig(dropout=0.0),
        sft=TrainConfig(steps=20, lr=1e-3, global_batch=4, warmup_steps=4, eval_every=10),
    )


def test() -> Recipe:
    """Seconds, on a random model of four layers: for tests and for trying things out."""
    recipe = small()
    train = TrainConfig(steps=4, lr=1e-3, global_batch=4, seq_len=256, warmup_steps=1, eval_every=2)
    return dataclasses.replace(
        recipe,
        name="test",
        model=asset(TINY),
        corpus=dataclasses.replace(recipe.corpus, rows=24, held_out=2),
        instruct=dataclasses.replace(recipe.instruct, rows=200, held_out=16),
        evaluate=dataclasses.replace(recipe.evaluate, rows=16),
        prune=PruneConfig(keep_first=1, keep_last=1, ratio=0.5),
        calibration_rows=2,
        compensate=CompensateConfig(),
        offset=OffsetConfig(),
        align=train,
        sft=train,
        place=Place(cpus_per_worker=1),  # such steps are all start-up, which two cores share
    )


def paper(name: str, model: str, **changes: Any) -> Recipe:
    """The paper's data and settings, on one node of 8 GPUs."""
    recipe = Recipe(
        name=name,
        model=model,
        corpus=Corpus(
            (
                SourceSpec("hf://datasets/HuggingFaceFW/fineweb/sample/10BT", share=0.1),
                SourceSpec("hf://datasets/open-web-math/open-web-math/data", share=0.1),
            )
        ),
        instruct=Instruct(
            (SourceSpec("hf://datasets/teknium/OpenHermes-2.5@refs/convert/parquet"),)
        ),
        evaluate=Evaluate(out_of_domain=(SourceSpec("hf://datasets/tatsu-lab/alpaca/data"),)),
        align=TrainConfig(steps=200, lr=5e-5),
        nf4=True,
        place=Place(8, 8, gpus_per_worker=1, micro_batch=4, gradient_checkpointing=True),
    )
    return dataclasses.replace(recipe, **changes)


def llama2_13b() -> Recipe:
    """LLaMA-2-13B, Stru 0.65, not quantised."""
    return paper("llama2-13b", "meta-llama/Llama-2-13b-hf", nf4=False)


def llama2_70b() -> Recipe:
    """LLaMA-2-70B, QLoRAM-Stru 0.85: the comparison is with QLoRA, 70B in 16 bits does not fit."""
    return paper(
        "llama2-70b",
        "meta-llama/Llama-2-70b-hf",
        prune=PruneConfig(ratio=0.85),
        compare=("qlora",),
    )


def llama31_70b() -> Recipe:
    """LLaMA-3.1-70B, QLoRAM-Stru 0.85, 400 alignment steps."""
    return dataclasses.replace(
        llama2_70b(),
        name="llama31-70b",
        model="meta-llama/Llama-3.1-70B",
        align=TrainConfig(steps=400, lr=5e-5),
    )


NAMED = {
    "small": small,
    "test": test,
    "llama2-13b": llama2_13b,
    "llama2-70b": llama2_70b,
    "llama31-70b": llama31_70b,
}


def resolve(name: str, changes: list[str]) -> Recipe:
    """The recipe that is run: `read`, with what its method decides written into it."""
    return settled(read(name, changes))


def settled(recipe: Recipe) -> Recipe:
    """The recipe that says what is removed, also where the method decides it, and where local files
    are from wherever it is run.

    Raises:
        UserError: a ratio that the method cannot have.
    """
    replace, asked = dataclasses.replace, recipe.evaluate
    model = os.path.abspath(recipe.model) if Path(recipe.model).is_dir() else recipe.model
    return replace(
        recipe,
        model=model,
        corpus=replace(recipe.corpus, sources=_absolute(recipe.corpus.sources)),
        instruct=replace(recipe.instruct, sources=_absolute(recipe.instruct.sources)),
        evaluate=replace(
            asked,
            in_domain=_absolute(asked.in_domain),
            out_of_domain=_absolute(asked.out_of_domain),
        ),
        prune=replace(recipe.prune, ratio=ratio(recipe.prune)),
    )


def _absolute(sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
    return tuple(
        s if "://" in s.path else dataclasses.replace(s, path=os.path.abspath(s.path))
        for s in sources
    )


def read(name: str, changes: list[str]) -> Recipe:
    """The recipe of that name, or of a JSON file that a run left behind, with changes applied.

    Args:
        changes: `key=value` with dotted keys, such as `sft.lr=3e-4`; a value is JSON, or else text.

    Raises:
        UserError: unknown recipe or key, or a value of another type.
    """
    if name in NAMED:
        settings = dataclasses.asdict(NAMED[name]())
    elif name.endswith(".json") and Path(name).is_file():
        try:
            settings = json.loads(Path(name).read_text())
        except ValueError as error:
            refuse("recipe", f"{name}, which is not JSON ({error})", "a recipe.json of a run")
        if not isinstance(settings, dict):
            refuse("recipe", f"{name}, a JSON list or value", "a recipe.json of a run")
    else:
        refuse("recipe", repr(name), f"{', '.join(NAMED)}, or a recipe.json of a run")
    return parsed(changed(settings, changes))
