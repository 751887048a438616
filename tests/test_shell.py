"""`python -m loram`: recover, merge, generate, and what a user may get wrong."""

import subprocess
import sys

import torch
from safetensors.torch import save_file

from loram.adapter import attach, open_adapted, save_adapter
from loram.data import load_tokenizer
from loram.evaluate import generate
from loram.model import load
from loram.prune import PruneConfig, choose, prune
from loram.taylor import random_scores
from pipelines.assets import home
from tests.offsetting import ADAPTER

TINY = home() / "assets" / "tiny-llama"


def shell(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "loram", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_recover_merge_and_generate(tmp_path):
    """What is printed is the answer alone."""
    full = load(TINY).config
    kept = choose(
        random_scores(full, 3), full, PruneConfig("rand", 0.5, keep_first=1, keep_last=1, seed=3)
    )
    prune(TINY, tmp_path / "pruned", kept)
    adapted = attach(load(tmp_path / "pruned"), ADAPTER)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data = torch.full_like(weight, 0.05)
    save_adapter(adapted, tmp_path / "adapter")
    made = tmp_path / "adapter", tmp_path / "pruned", TINY, tmp_path / "recovered"
    for words in (("recover", *made), ("merge", TINY, made[-1], tmp_path / "merged")):
        done = shell(*words)
        assert (done.returncode, done.stdout) == (0, "") and "gemm_4bit" not in done.stderr
    before, merged = (load(path).state_dict() for path in (TINY, tmp_path / "merged"))
    assert not torch.equal(*(w["model.layers.1.mlp.up_proj.weight"] for w in (before, merged)))
    messages = [{"role": "user", "content": "2 + 2?"}]
    adapted = open_adapted(TINY, made[-1])
    answer = generate(adapted, load_tokenizer(TINY), messages, max_new_tokens=8)
    said = shell("generate", TINY, "2 + 2?", "--adapter", made[-1], "--max-new-tokens", "8")
    assert said.returncode == 0 and said.stdout == f"{answer}\n"
    again, found = shell("recover", *made), f"{made[-1]}, which exists"
    assert again.returncode == 2
    assert again.stderr == f"error: out: found {found}; accepted: a directory to be made\n"


def test_an_adapter_that_is_not_one_is_refused_in_one_line(tmp_path):
    done = shell("merge", TINY, tmp_path, tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    found = f"{tmp_path} without adapter_config.json"
    assert done.stderr == f"error: adapter: found {found}; accepted: a PEFT adapter directory\n"
    (tmp_path / "adapter_config.json").write_text("{}")
    done = shell("recover", tmp_path, TINY, TINY, tmp_path / "out")
    assert done.returncode == 2 and "without adapter_model.safetensors" in done.stderr
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    done = shell("merge", TINY, tmp_path, tmp_path / "out")
    assert done.returncode == 2 and f"{tmp_path}, damaged (" in done.stderr
    save_file({}, tmp_path / "adapter_model.safetensors")
    done = shell("recover", tmp_path, TINY, TINY, tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: adapter: found peft_type None; accepted: LORA")
    done = shell("generate", tmp_path, "question")
    assert done.stderr.startswith(f"error: base: found {tmp_path} without config.json")
