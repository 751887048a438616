"""Open and save full, pruned, compressed and 4-bit models as ordinary Hugging Face directories.

`load` opens all of them; after `register` so does every tool that uses the Auto classes.
"""

import json
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loram.errors import refuse
from loram.hub import config_dict, split
from loram.pruned import PREFIX, SUPPORTED, config_class_of, model_class

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, nf4: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """Open a full, pruned or saved-NF4 model directory (or a hub id of a full one).

    Args:
        dtype: dtype of the weights, and with NF4 of those that stay unquantised and of compute.
        nf4: quantise the decoder's linears to NF4 with double quantisation while loading; a
            directory that was saved in NF4 is opened as such without it.
        device: such as `cpu` or `cuda:1`; with `auto` on the GPU what fits there, and the rest in
            memory until it is needed.

    Raises:
        UserError: the directory is not a model, or one of another architecture.
    """
    config = read_config(path)
    quantisation = nf4_config(dtype) if nf4 else None
    name, revision = split(path)
    model = model_class(config.model_type).from_pretrained(
        name,
        revision=revision,
        config=config,
        dtype=dtype,
        device_map=device if device == "auto" else {"": device},
        quantization_config=quantisation,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first forward pass without gradients would re-pack the
            # weight for a kernel that rounds its scales and fails on widths like 537.
            module.support_avx512bf16_for_cpu = False
    return model


def save(model: PreTrainedModel, directory: Path) -> None:
    """Write `config.json` and sharded safetensors that `load` opens bit-equal."""
    model.save_pretrained(directory)


def nf4_config(dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """QLoRAM's setting: NF4, double quantisation, `dtype` compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def read_config(path: str | Path, setting: str = "model") -> PreTrainedConfig:
    """The config of a full or pruned model.

    Raises:
        UserError: no readable config, or an architecture that is not supported; reads no weights.
    """
    directory = Path(path)
    if directory.exists():
        file = directory / "config.json"
        if not file.is_file():
            refuse(setting, f"{path} without config.json", "a model directory")
        try:
            raw = json.loads(file.read_text())
        except ValueError as error:
            refuse(setting, f"{file} that is not JSON ({error})", "a model's config.json")
    else:
        raw = config_dict(str(path), setting)
    model_type = str(raw.get("model_type"))
    if model_type.removeprefix(PREFIX) not in SUPPORTED:
        refuse(setting, f"model_type {model_type!r} in {path}", ", ".join(SUPPORTED))
    return config_class_of(model_type).from_dict(raw)


def check_dense(config: PreTrainedConfig, path: str | Path, setting: str = "model") -> None:
    """Refuse a model whose weights are not there as matrices.

    Raises:
        UserError: it is quantised, by whatever method, or compressed.
    """
    if getattr(config, "quantization_config", None) or getattr(config, "survivors", None):
        refuse(setting, f"{path}, quantised or compressed", "the model before, or the full one")


def check_full(config: PreTrainedConfig, path: str | Path) -> None:
    """Refuse what is no full model of one of the families.

    Raises:
        UserError: as of `check_dense`, or it was pruned.
    """
    check_dense(config, path)
    if config.model_type.startswith(PREFIX):
        refuse("model", f"{path}, a pruned model", "the full model that it was cut from")


def register() -> None:
    """Make transformers' Auto classes, and what is built on them, open pruned models."""
    for base in SUPPORTED:
        config_class = config_class_of(PREFIX + base)
        AutoConfig.register(PREFIX + base, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class(PREFIX + base), exist_ok=True)


def check_weights(path: Path, setting: str = "model") -> None:
    """Refuse a local model directory whose weights are missing or truncated; reads headers only.

    Raises:
        UserError: names the file.
    """
    for file in weight_files(path, setting):
        try:
            with safe_open(file, framework="pt"):
                pass  # opening compares the header with the file's size
        except SafetensorError as error:
            refuse(setting, f"{file}, damaged ({error})", "whole safetensors files")


def weight_files(path: Path, setting: str = "model") -> list[Path]:
    """The safetensors of a local model directory.

    Raises:
        UserError: one is missing (named).
    """
    index = path / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if not (path / name).is_file():
            refuse(setting, f"{path} without {name}", "a model directory with safetensors weights")
    return [path / name for name in names]
