"""What the files of a PEFT adapter say: names, shapes and options, and what is refused by them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig

from loram.errors import refuse
from loram.hub import split
from loram.masked import PEFT_TYPE
from loram.pruned import meta_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTORS = "lora_B", "lora_A"  # by the dimension of the weight, (out, in), that each has
# Options of PEFT under which an update is another one than LoRA's, unless they are so.
NOT_PLAIN = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
}


def named(base: str | Path) -> dict[str, str | None]:
    """How an adapter's config names its base: a directory, or a hub id and its revision."""
    name, revision = split(base)
    return {
        "base_model_name_or_path": name,
        "revision": None if Path(name).exists() else revision,
    }


def read_adapter(adapter: Path) -> dict[str, Any]:
    """The config of a PEFT adapter directory.

    Raises:
        UserError: its config or its weights are missing or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            refuse("adapter", f"{adapter} without {name}", "a PEFT adapter directory")
    try:
        config = json.loads((adapter / CONFIG).read_text())
        with safe_open(adapter / WEIGHTS, framework="pt"):
            pass  # opening compares the header with the file's size
    except (ValueError, SafetensorError) as error:
        refuse("adapter", f"{adapter}, damaged ({error})", "a whole adapter")
    if not isinstance(config, dict):
        refuse("adapter", f"{adapter / CONFIG} that is no JSON object", "a PEFT adapter directory")
    return config


def refuse_unless_plain(config: dict) -> None:
    """Refuse adapters whose update is not a multiple of `lora_B @ lora_A` on frozen weights."""
    kind = config.get("peft_type")
    if kind not in ("LORA", PEFT_TYPE):
        refuse("adapter", f"peft_type {kind!r}", f"LORA, {PEFT_TYPE}")
    for option, plain in NOT_PLAIN.items():
        if config.get(option) not in (plain, None):
            refuse(f"adapter {option}", config[option], json.dumps(plain))
    start = config.get("init_lora_weights", True)
    # PiSSA, OLoRA, LoftQ and the like move part of the base weight into the factors.
    if start not in (True, False, None, "gaussian", "orthogonal"):
        refuse("adapter init_lora_weights", repr(start), "true, false, gaussian, orthogonal")


def module_and_factor(name: str) -> tuple[str, str]:
    """What a tensor of an adapter belongs to; the factor is one of `FACTORS`, or something else."""
    path = name.removeprefix("base_model.model.").removesuffix(".weight")
    module, _, factor = path.rpartition(".")
    return module, factor


def shapes(adapter: Path) -> dict[str, Sequence[int]]:
    """Of the adapter's tensors, by name; reads no more than the file's header."""
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


def check_fits(tensors: Mapping[str, Sequence[int]], config: PreTrainedConfig) -> None:
    """Refuse LoRA factors of another model, such as an adapter that was not recovered.

    Args:
        tensors: the adapter's names and shapes.
        config: of the model, full or pruned.
    """
    modules = dict(meta_model(config).named_modules())
    for name, shape in tensors.items():
        module, factor = module_and_factor(name)
        if factor not in FACTORS:
            continue
        linear, dim = modules.get(module), FACTORS.index(factor)
        if not isinstance(linear, nn.Linear):
            refuse("adapter", f"a factor of {module}", "an adapter of this model, which has none")
        wanted = (linear.out_features, linear.in_features)[dim]
        if shape[dim] != wanted:
            found = f"{module}.{factor} of shape {tuple(shape)}"
            accepted = f"{wanted} along dim {dim}, as this model; one of a pruned model, recovered"
            refuse("adapter", found, accepted)
