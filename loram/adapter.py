"""LoRA on the small model, and its way back to the large one."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loram.errors import refuse
from loram.kept import Kept
from loram.masked import PEFT_TYPE, MaskedLora, save_masks, set_masks_
from loram.masks import copy_masks, layer_masks, unpacked
from loram.model import load, local, read_config, save
from loram.prune import copy_companions

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA of the paper's section 4: r 8, alpha 16 (scale alpha / r), dropout 0.05, all linears.

    masked: for Semi and Unst, multiply the update with the mask (`loram.masked`).
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    masked: bool = False


def attach(
    model: PreTrainedModel,
    config: AdapterConfig,
    seed: int = 0,
    masks: str | Path | None = None,
) -> PeftModel:
    """Freeze `model` and put trainable LoRA factors (float32) beside its linears.

    lora_A is drawn from `seed`, lora_B is zero: the function of the model does not change.

    Args:
        masks: where those of a masked update are: a pruned model's directory, or an adapter's.
    """
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        task_type="CAUSAL_LM",
    )
    if config.masked:
        lora._register_custom_module({nn.Linear: MaskedLora})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora)
    if config.masked:
        set_masks_(adapted, masks or model.name_or_path)
    return adapted


def restrict_(model: PeftModel, pruned: Path) -> dict[nn.Parameter, Tensor]:
    """Confine the LoRA of a full model to the positions that a pruned model has.

    What trains so, on the full model, is a bound for what recovery can give.

    Returns: masks for `loram.train.train`, which keep the other positions at zero.
    """
    masks = {}
    for name, cut in Kept.load(pruned).slices(model.config).items():
        module = model.base_model.model.get_submodule(name)
        if not hasattr(module, "lora_A"):
            continue
        factor = (module.lora_B, module.lora_A)[cut.dim]["default"].weight
        masks[factor] = cut.put(torch.ones_like(cut.take(factor.data))).bool()
        factor.data.mul_(masks[factor])
    return masks


def save_adapter(model: PeftModel, out: Path) -> None:
    """Write the adapter alone: a stock PEFT directory, or, of a masked update, one with masks."""
    model.save_pretrained(out, save_embedding_layers=False)
    config = json.loads((out / CONFIG).read_text())
    config["target_modules"].sort()  # peft keeps a set
    if any(isinstance(module, MaskedLora) for module in model.modules()):
        config["peft_type"] = PEFT_TYPE
        save_masks(model, out)
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def recover(adapter: Path, pruned: Path, base: str | Path, out: Path) -> None:
    """Re-shape an adapter of the pruned model so that it fits the full model.

    The factor that shares the cut dimension (lora_B rows of q, k, v, gate, up; lora_A columns of
    o, down) gets exact zeros where something was pruned and its trained values elsewhere; the
    other factor, and adapters of whole layers, are copied. See `loram.kept` on the paper's (1 - M).
    The result is a stock PEFT adapter for `base`.

    Args:
        adapter: PEFT adapter directory trained on the pruned model.
        pruned: directory with the `kept.safetensors` of that model.
        base: the full model, a directory or a hub id; only its config is read.

    Raises:
        UserError: an adapter that is not plain LoRA, or that does not fit the pruned model.
    """
    adapter, out = Path(adapter), Path(out)
    config = json.loads((adapter / CONFIG).read_text())
    refuse_unless_plain(config)
    slices = Kept.load(pruned).slices(read_config(base))
    tensors: dict[str, Tensor] = {}
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            module, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            cut = slices.get(module)
            if cut and factor == ("lora_B", "lora_A")[cut.dim]:
                if tensor.shape[cut.dim] != len(cut.index):
                    refuse(
                        "adapter",
                        f"{module}.{factor} of shape {tuple(tensor.shape)}",
                        f"{len(cut.index)} along dim {cut.dim}, as the pruned model in {pruned}",
                    )
                tensor = cut.put(tensor)
            tensors[name] = tensor
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config |= {"base_model_name_or_path": str(base), "inference_mode": True}
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    copy_masks(adapter, out)


def adapt_layer_(adapter: Path, layer: nn.Module, i: int) -> None:
    """Put a recovered adapter on decoder layer `i` of the full model, for inference.

    It stays a path of its own, as under PEFT: most of a small update would be rounded away where
    weights are cast to 16 bits.
    """
    config, masks = json.loads((adapter / CONFIG).read_text()), layer_masks(adapter, i)
    device = next(layer.parameters()).device
    with safe_open(adapter / WEIGHTS, framework="pt", device=str(device)) as file:
        for name in sorted(file.keys()):
            module, factor, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            prefix, _, linear = module.partition(f"model.layers.{i}.")
            if prefix or not linear or factor != "lora_A":
                continue
            a, b = (file.get_tensor(name.replace("lora_A", f"lora_{x}")).float() for x in "AB")
            b *= _scaling(config, len(a))
            bits = masks[module].to(device) if module in masks else None
            layer.get_submodule(linear).register_forward_hook(partial(_adapted, a, b, bits))


def _adapted(
    a: Tensor, b: Tensor, bits: Tensor | None, linear: nn.Module, given: tuple, output: Tensor
) -> Tensor:
    (x,) = given
    if bits is None:
        return output + F.linear(F.linear(x, a), b)
    return output + F.linear(x, (b @ a) * unpacked(bits, a.shape[1]))


def _scaling(config: dict, r: int) -> float:
    """s, the factor before lora_B @ lora_A.

    Raises:
        UserError: another one for each module.
    """
    if config.get("alpha_pattern"):
        refuse("adapter alpha_pattern", config["alpha_pattern"], "none")
    return config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)


def refuse_unless_plain(config: dict) -> None:
    """Refuse adapters whose update is not `alpha / r * lora_B @ lora_A` on frozen weights."""
    kind = config.get("peft_type")
    if kind not in ("LORA", PEFT_TYPE):
        refuse("adapter", f"peft_type {kind!r}", f"LORA, {PEFT_TYPE}")
    for option, plain in (("use_dora", (False, None)), ("lora_bias", (False, None))):
        if config.get(option) not in plain:
            refuse(f"adapter {option}", config[option], "false")
    start = config.get("init_lora_weights", True)
    # PiSSA, OLoRA, LoftQ and the like move part of the base weight into the factors.
    if start not in (True, False, None, "gaussian", "orthogonal"):
        refuse("adapter init_lora_weights", repr(start), "true, false, gaussian, orthogonal")


def open_adapted(
    base: str | Path, adapter: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> PeftModel:
    """The model `base` with an adapter of its shape on it, for inference; options as in `load`."""
    model = load(base, dtype=dtype, device=device)
    config = json.loads((Path(adapter) / CONFIG).read_text())
    if config["peft_type"] != PEFT_TYPE:
        return PeftModel.from_pretrained(model, adapter).eval()
    settings = AdapterConfig(
        config["r"],
        config["lora_alpha"],
        config["lora_dropout"],
        tuple(config["target_modules"]),
        masked=True,
    )
    adapted = attach(model, settings, masks=adapter)
    set_peft_model_state_dict(adapted, load_file(Path(adapter) / WEIGHTS))
    return adapted.eval()


def merge(base: str | Path, adapter: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `base` with the adapter added to its weights, as an ordinary model directory.

    The sum is done in float32 and rounded once to `dtype`: the base weights were never quantised,
    so nothing of a QLoRAM adapter is lost in merging.
    """
    merged = open_adapted(base, adapter, dtype=torch.float32).merge_and_unload()
    save(merged.to(dtype), Path(out))
    copy_companions(local(base), Path(out))
