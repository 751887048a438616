"""The README's notebook, run as it is printed; and the same small model under the HF Trainer."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import loram
from loram.adapter import recover
from loram.model import load
from loram.prune import PruneConfig, choose, prune
from loram.taylor import random_scores
from pipelines.assets import home
from tests.rows import TrainerRows

README = Path(__file__).parents[1] / "README.md"
TINY = home() / "assets" / "tiny-llama"
IDS = torch.arange(5, 25)[None]


def test_the_readme_runs_as_printed(tmp_path):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
    code = code.replace("path/to/model", str(TINY)).replace('"notebook"', repr(str(tmp_path)))
    # The tiny model has four layers: nothing of it would be pruned with six kept whole.
    code = code.replace("ratio=0.65", "ratio=0.5, keep_first=1, keep_last=1")
    code += "\nimport sys; assert not {'ray', 'mlflow'} & set(sys.modules), 'Ray in a notebook'\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["1", "2", "3", "4"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        before = base(IDS).logits
        after = PeftModel.from_pretrained(base, tmp_path / "recovered")(IDS).logits
    assert not torch.equal(before, after)


def test_stock_peft_and_trainer_train_the_small_model(tmp_path):
    config = loram.model.read_config(TINY)
    cut = PruneConfig(method="rand", ratio=0.5, keep_first=1, keep_last=1)
    prune(TINY, tmp_path / "pruned", choose(random_scores(config, 0), config, cut))
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    small = get_peft_model(load(tmp_path / "pruned"), lora)
    settings = TrainingArguments(
        tmp_path / "trainer", max_steps=3, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(small, settings, train_dataset=TrainerRows()).train()
    small.save_pretrained(tmp_path / "adapter")
    recover(tmp_path / "adapter", tmp_path / "pruned", TINY, tmp_path / "recovered")
    base = AutoModelForCausalLM.from_pretrained(TINY)
    assert PeftModel.from_pretrained(base, tmp_path / "recovered")(IDS).logits.isfinite().all()
