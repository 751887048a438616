"""Open and save full, pruned and 4-bit models as ordinary Hugging Face directories.

A pruned model whose layers are all cut alike is a stock model with smaller numbers in its config,
and opens in any tool. Otherwise (some layers kept whole, the paper's setting) its `model_type` is
`loram_<base>`: a subclass of the stock class, made on the fly, that shrinks its linears before
`from_pretrained` fills them. Stock loaders refuse that name instead of re-initialising what does
not fit; `load` opens it, and after `register` so does every tool that uses the Auto classes.
"""

import json
from functools import cache
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loram.data import DEFAULT_CHAT_TEMPLATE
from loram.errors import refuse
from loram.kept import Kept, head_dim

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "loram_"


def load(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, nf4: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """Open a full, pruned or saved-NF4 model directory (or a hub id of a full one).

    Args:
        dtype: dtype of the weights, and with NF4 of those that stay unquantised and of compute.
        nf4: quantise the decoder's linears to NF4 with double quantisation while loading; a
            directory that was saved in NF4 is opened as such without it.

    Raises:
        UserError: the directory is not a model, or one of another architecture.
    """
    config = read_config(path)
    quantisation = nf4_config(dtype) if nf4 else None
    model = model_class(config.model_type).from_pretrained(
        path,
        config=config,
        dtype=dtype,
        device_map={"": device},
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


def local(path: str | Path) -> Path:
    """The directory itself, or the one that a hub id is downloaded to (weights as safetensors)."""
    if Path(path).is_dir():
        return Path(path)
    return Path(
        snapshot_download(
            str(path), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]
        )
    )


def save(model: PreTrainedModel, directory: Path) -> None:
    """Write `config.json` and sharded safetensors that `load` opens bit-equal."""
    model.save_pretrained(directory, safe_serialization=True)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a base model without a chat template gets the project's plain one."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


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
        try:
            if not isinstance(try_to_load_from_cache(str(path), "config.json"), str):
                HfApi().model_info(str(path), timeout=5)  # a download would retry for half a minute
            raw, _ = PreTrainedConfig.get_config_dict(path)
        except Exception:  # the hub client raises what its HTTP library of the day raises
            refuse(setting, f"{path}, neither a directory nor a hub id within reach", "a model")
    model_type = str(raw.get("model_type"))
    if model_type.removeprefix(PREFIX) not in SUPPORTED:
        refuse(setting, f"model_type {model_type!r} in {path}", ", ".join(SUPPORTED))
    return _config_class(model_type).from_dict(raw)


def pruned_config(config: PreTrainedConfig, kept: Kept) -> PreTrainedConfig:
    """The config of the model that keeps `kept`: the stock type if all layers are cut alike."""
    kv_heads, neurons = [len(x) for x in kept.kv_heads], [len(x) for x in kept.neurons]
    common = config.to_dict()
    if len(set(kv_heads)) == 1 and len(set(neurons)) == 1:
        heads = config.num_attention_heads // config.num_key_value_heads * kv_heads[0]
        # Llama's own config refuses a head count that does not divide the hidden size.
        if config.model_type != "llama" or config.hidden_size % heads == 0:
            common |= {
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads[0],
                "head_dim": head_dim(config),
                "intermediate_size": neurons[0],
            }
            return type(config).from_dict(common)
    model_type = PREFIX + config.model_type
    common |= {
        "model_type": model_type,
        "architectures": [model_class(model_type).__name__],
        "kept_kv_heads": kv_heads,
        "kept_neurons": neurons,
    }
    return _config_class(model_type).from_dict(common)


def register() -> None:
    """Make transformers' Auto classes, and what is built on them, open pruned models."""
    for base in SUPPORTED:
        config_class = _config_class(PREFIX + base)
        AutoConfig.register(PREFIX + base, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class(PREFIX + base), exist_ok=True)


def check_weights(path: Path, setting: str = "model") -> None:
    """Refuse a local model directory whose weights are missing or truncated; reads headers only.

    Raises:
        UserError: names the file.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (path / name).is_file():
            refuse(setting, f"{path} without {name}", "a model directory with safetensors weights")
        try:
            with safe_open(path / name, framework="pt"):
                pass  # opening compares the header with the file's size
        except SafetensorError as error:
            refuse(setting, f"{path / name}, damaged ({error})", "whole safetensors files")


@cache
def _config_class(model_type: str) -> type[PreTrainedConfig]:
    stock = CONFIG_MAPPING[model_type.removeprefix(PREFIX)]
    if not model_type.startswith(PREFIX):
        return stock
    return type(f"Loram{stock.__name__}", (stock,), {"model_type": model_type})


@cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class of a supported model type: transformers' own, or its pruned subclass."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[_config_class(model_type.removeprefix(PREFIX))]
    if not model_type.startswith(PREFIX):
        return stock

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        _shrink_(self, config.kept_kv_heads, config.kept_neurons)

    body = {"__init__": __init__, "config_class": _config_class(model_type)}
    return type(f"Loram{stock.__name__}", (stock,), body)


def _shrink_(model: PreTrainedModel, kv_heads: list[int], neurons: list[int]) -> None:
    """Give every layer's linears their pruned widths, empty: `from_pretrained` fills them.

    Attention reshapes with -1 heads, and whole KV groups were removed, so the stock forward pass
    runs on the smaller projections as it is.
    """
    config, dim = model.config, head_dim(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    for layer, kept_kv, kept_neurons in zip(model.model.layers, kv_heads, neurons, strict=True):
        attn, mlp, kv, q = layer.self_attn, layer.mlp, kept_kv * dim, kept_kv * group * dim
        for parent, name, out_features, in_features in (
            (attn, "q_proj", q, None),
            (attn, "k_proj", kv, None),
            (attn, "v_proj", kv, None),
            (attn, "o_proj", None, q),
            (mlp, "gate_proj", kept_neurons, None),
            (mlp, "up_proj", kept_neurons, None),
            (mlp, "down_proj", None, kept_neurons),
        ):
            old = getattr(parent, name)
            new = nn.Linear(
                in_features or old.in_features,
                out_features or old.out_features,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            setattr(parent, name, new)
