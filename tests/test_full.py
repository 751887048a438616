"""The main job from end to end, as a user types it, on the recipe for tests."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipelines.assets import home
from tests.hub import serving

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A home of one's own with the assets in it; runs the main job from another directory."""
    own = tmp_path_factory.mktemp("home")
    (own / "assets").symlink_to(home() / "assets")

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "pipelines" / "full.py", *words],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
            | {"LORAM_HOME": str(own)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.home = own
    return run


def made(log: str) -> set[str]:
    """The steps that really ran."""
    return set(re.findall(r"^  (\S+) +\w{12}  done in", log, re.M))


@pytest.mark.timeout(1200)
def test_first_run_then_a_changed_learning_rate(user):
    """One run makes everything; another learning rate makes again only what depends on it."""
    log = user("test")
    everything = {"corpus", "instruct", "in_domain", "out_of_domain", "score", "prune", "align"}
    everything |= {"quantise", "sft", "sft_lora", "recover", "evaluate_base", "evaluate_lora"}
    everything |= {"evaluate_small", "evaluate_large"}
    assert made(log) == everything
    for label in ("base", "LoRA", "QLoRAM-Stru, small", "QLoRAM-Stru, large"):
        assert f"│ {label} " in log
    adapter = Path(re.search(r"recovered adapter +(\S+)", log).group(1))
    report = Path(re.search(r"report +(\S+)", log).group(1))
    assert "<table>" in report.read_text() and (report.parent / "curves.png").exists()
    base = AutoModelForCausalLM.from_pretrained(home() / "assets" / "tiny-llama")
    ids = torch.arange(10, 30)[None]
    before = base(ids).logits
    assert not torch.equal(PeftModel.from_pretrained(base, adapter)(ids).logits, before)

    plan = user("test", "--dry-run")
    assert plan.count("│ yes") == len(everything)
    again = user(str(report.parent / "recipe.json"), "sft.lr=2e-3")
    changed = {"sft", "sft_lora", "recover", "evaluate_lora", "evaluate_small", "evaluate_large"}
    assert made(again) == changed

    store = user.home / "store"
    for name in ("sft_lora", "prune", "quantise"):  # as `pipelines.store clean` may
        shutil.rmtree(next(store.glob(f"{name}-*")))
    short = user("test", f"tracking=sqlite:///{user.home}/other.db")
    assert made(short) == set() and "│ LoRA " in short and "│ QLoRAM-Stru, large" in short

    client = MlflowClient(f"sqlite:///{user.home}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("loram")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert {run.info.status for run in runs} == {"FINISHED"}
    pipelines = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == len(everything) + len(changed) + len(pipelines) == 23
    last = max(pipelines, key=lambda run: run.info.start_time)
    assert last.data.params["sft.lr"] == "0.002"
    table = json.loads((report.parent / "table.json").read_text())
    first = min(pipelines, key=lambda run: run.info.start_time)
    assert first.data.metrics["large_loss"] == pytest.approx(table[3]["loss"])
    found = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert found == {"adapter", "kept", "report"}
    sft = next(run for run in runs if run.data.tags.get("mlflow.runName") == "sft")
    losses = client.get_metric_history(sft.info.run_id, "loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    assert {"lr", "grad_norm", "tokens_per_second", "peak_memory"} <= sft.data.metrics.keys()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_way_to_close_the_gap(user, tmp_path, monkeypatch):
    """In one run, with the bound beside them; NF4; a model of the hub."""
    commit = "1" * 40
    shutil.copytree(home() / "assets" / "tiny-llama", tmp_path / f"models/someone/tiny/{commit}")
    words = ["compensate.rank=4", "compensate.data=both", "compensate.rows=4"]
    words += ["distil.top=32", 'compare=["lora","bound"]', "compensate.gradients=true"]
    words += ["offset.every=1", "offset.parts=2"]
    words += ["evaluate.in_domain=[]", "place.gradient_checkpointing=true"]
    with serving(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        log = user("test", "model=someone/tiny", *words)
    wanted = {"compensate", "targets", "distil", "quantise", "offsets", "sft_bound", "recover"}
    assert wanted <= made(log)
    assert "│ LoRA where pruning keeps " in log and "│ QLoRAM-Stru, large " in log
    report = Path(re.search(r"report +(\S+)", log).group(1))
    records = {
        name: json.loads((report.parents[2] / f"{name}-{key}" / "record.json").read_text())
        for name, key in re.findall(r"^  (\w+) +(\w{12})  done in", log, re.M)
    }
    assert records["compensate"]["metrics"]["stand_in_parameters"] == 2 * 2 * 2 * 4 * 64
    assert records["targets"]["metrics"]["bytes"] > 0
    assert records["targets"]["metrics"]["peak_memory_bytes"] > 1e8
    assert records["offsets"]["metrics"]["bytes"] > 0
    assert {"offsets", "earlier"} <= records["sft"]["inputs"].keys()
    assert not {"offsets", "earlier"} & records["sft_bound"]["inputs"].keys()
    curves = Path(report.parent / "report.html").read_text()
    assert curves.count("<td>sft</td>") == curves.count("<td>offsets</td>") == 2
    adapter = Path(re.search(r"recovered adapter +(\S+)", log).group(1))
    assert json.loads((adapter / "adapter_config.json").read_text())["revision"] == commit
    again = json.loads((report.parent / "recipe.json").read_text())
    assert again["model"] == f"someone/tiny@{commit}"
    base = AutoModelForCausalLM.from_pretrained(home() / "assets" / "tiny-llama")
    assert PeftModel.from_pretrained(base, adapter)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rand_without_alignment_in_16_bits(user):
    log = user("test", "prune.method=rand", "align.steps=0", "nf4=false", 'compare=["qlora"]')
    assert "LoRAM-Rand, large" in log and "│ QLoRA " in log and "no LoRA on the full" in log
    assert not {"align", "quantise", "sft_lora"} & made(log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("method", "nf4"), [("rand", "true"), ("stru", "false")])
def test_groups_to_the_final_table(method, nf4, user):
    """What the tests above leave: Rand in 4 bits, Stru in 16."""
    log = user("test", f"prune.method={method}", f"nf4={nf4}")
    ours = ("QLoRAM-" if nf4 == "true" else "LoRAM-") + method.capitalize()
    assert f"│ {ours}, large " in log and ("quantise" in made(log)) == (nf4 == "true")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("nf4", ["false", "true"])
@pytest.mark.parametrize("method", ["semi", "unst"])
def test_single_weights_to_the_final_table(method, nf4, user):
    """Aligned, compressed, trained, recovered, one of them under the mask."""
    masked = "true" if (method, nf4) == ("unst", "false") else "false"
    log = user("test", f"prune.method={method}", f"nf4={nf4}", f"adapter.masked={masked}")
    assert {"compress", "sft", "recover", "evaluate_large"} <= made(log)
    report = Path(re.search(r"report +(\S+)", log).group(1))
    table = {row["label"]: row for row in json.loads((report.parent / "table.json").read_text())}
    ours = ("QLoRAM-" if nf4 == "true" else "LoRAM-") + method.capitalize()
    small, large = table[f"{ours}, small"], table[f"{ours}, large"]
    assert small["parameters"] == large["parameters"] < table["LoRA"]["parameters"]
    assert large["loss"] != table["base"]["loss"] != small["loss"]
    assert f"│ {ours}, large " in log
