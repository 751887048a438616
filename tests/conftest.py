"""Small random models of every supported family, and the real assets."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipelines.assets import home
from tests.sweeps import killed_and_finished

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
FAMILIES = tuple(CONFIGS)


def tiny_model(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """Four layers, hidden 64, 8 query heads on 4 KV heads, 96 neurons; every parameter random.

    Biases and norms are random too, so that a law cannot hold because something is zero or one.
    """
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    # Qwen3 and Mistral state a head_dim of their own, here one that is not hidden / heads.
    settings |= {"head_dim": 16} if family in ("qwen3", "mistral") else {}
    settings |= {"attention_bias": True} if family in ("llama", "qwen3") else {}
    config = CONFIGS[family](**(settings | changes))
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale, centre = (0.2, 1.0) if "norm" in name else (0.15, 0.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + centre)
    return model.eval()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as `make assets` prepared it."""
    return home() / "assets" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> tuple[Path, dict[str, str], str]:
    """A finished sweep, for all tests that look at one; see `killed_and_finished`."""
    return killed_and_finished(tmp_path_factory.mktemp("sweep"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA GPU; no others are."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
