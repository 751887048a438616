"""LoRA on the small model, and its way back to the large one."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loram.adapter_files import (
    CONFIG,
    FACTORS,
    WEIGHTS,
    check_fits,
    module_and_factor,
    named,
    read_adapter,
    refuse_unless_plain,
    shapes,
)
from loram.errors import refuse
from loram.kept import Kept
from loram.masked import PEFT_TYPE, MaskedLora, save_masks, set_masks_
from loram.masks import copy_masks, has_masks
from loram.model import load, read_config


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

    lora_A is drawn from `seed`, lora_B is zero: the function of the model does not change. Save it
    with `save_adapter`: PEFT's own method knows nothing of masks.

    Args:
        masks: where those of a masked update are: a pruned model's directory, or an adapter's.

    Raises:
        UserError: a masked update, and no mask for one of the linears.
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

    Raises:
        UserError: single weights were pruned, which confines no factor.
    """
    if has_masks(pruned):
        refuse("bound", f"{pruned}, of which single weights were pruned", "rand, stru")
    masks = {}
    for name, cut in Kept.load(pruned).slices(model.config).items():
        module = model.base_model.model.get_submodule(name)
        if not hasattr(module, "lora_A"):
            continue
        factor = getattr(module, FACTORS[cut.dim])["default"].weight
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
    other factor, adapters of whole layers and modules that were trained whole are copied; other
    weights of the small model, which PEFT may have saved along, are not. See `loram.kept` on the
    paper's (1 - M).
    The result is a stock PEFT adapter for `base`, of a masked one a masked one.

    Args:
        adapter: PEFT adapter directory trained on the pruned model.
        pruned: directory with the `kept.safetensors` of that model.
        base: the full model, a directory or a hub id; only its config is read.

    Raises:
        UserError: an adapter that is not plain LoRA, that does not fit the pruned model, or with
            modules that were trained whole and pruned.
    """
    adapter, out = Path(adapter), Path(out)
    config = read_adapter(adapter)
    refuse_unless_plain(config)
    full, kept = read_config(base, "base"), Kept.load(pruned)
    if len(kept.neurons) != full.num_hidden_layers:
        layers = f"a model of {len(kept.neurons)} layers, as the pruned one in {pruned}"
        refuse("base", f"{base} of {full.num_hidden_layers}", layers)
    slices = kept.slices(full)
    # Trained whole; all else that was saved is the small model's.
    trained = config.get("modules_to_save") or []
    for module in slices:
        if any(f".{module}".endswith(f".{name}") for name in trained):
            refuse("adapter modules_to_save", module, "modules of which pruning removed nothing")
    tensors: dict[str, Tensor] = {}
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        for name in sorted(file.keys()):
            module, factor = module_and_factor(name)
            whole = ".token_adapter." in name or any(f".{m}." in f".{name}" for m in trained)
            if not (factor.startswith("lora_") or whole):
                continue
            tensor, cut = file.get_tensor(name), slices.get(module)
            if cut and factor == FACTORS[cut.dim]:
                if tensor.shape[cut.dim] != len(cut.index):
                    refuse(
                        "adapter",
                        f"{module}.{factor} of shape {tuple(tensor.shape)}",
                        f"{len(cut.index)} along dim {cut.dim}, as the pruned model in {pruned}",
                    )
                tensor = cut.put(tensor)
            tensors[name] = tensor
    check_fits({name: tensor.shape for name, tensor in tensors.items()}, full)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config |= named(base) | {"inference_mode": True}
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    copy_masks(adapter, out)


def open_adapted(
    base: str | Path, adapter: Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> PeftModel:
    """The model `base` with an adapter of its shape on it, for inference; options as in `load`.

    Raises:
        UserError: as of `load` and `check_fits`; a masked adapter without masks, or with others, or
            on a model that neither the device nor memory holds.
    """
    config = read_adapter(Path(adapter))
    check_fits(shapes(Path(adapter)), read_config(base))
    model = load(base, dtype=dtype, device=device)
    where = getattr(model, "hf_device_map", {})
    # What waits in memory stays there: PEFT, which has to know, would plan anew with what is left.
    plan = {f"base_model.model.{name}": at for name, at in where.items()}
    if config.get("peft_type") != PEFT_TYPE:
        return PeftModel.from_pretrained(model, adapter, device_map=plan).eval()
    if "disk" in where.values():
        refuse(
            "adapter",
            f"{adapter}, of a masked update, and {base}, of which layers wait on disk",
            "the model that `merge` makes of both",
        )
    if waits := "cpu" in where.values():
        remove_hook_from_submodules(model)
    settings = AdapterConfig(
        config["r"],
        config["lora_alpha"],
        config["lora_dropout"],
        tuple(config["target_modules"]),
        masked=True,
    )
    adapted = attach(model, settings, masks=adapter)
    set_peft_model_state_dict(adapted, load_file(Path(adapter) / WEIGHTS))
    if waits:
        # It multiplies its factors instead of calling them, which would fetch each by itself.
        fetched = [MaskedLora.__name__]
        dispatch_model(adapted, plan, offload_buffers=True, preload_module_classes=fetched)
    return adapted.eval()
