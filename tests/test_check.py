"""Bad input, as a user would give it: one line that names it, exit status 2, Ray not started."""

import json
import shutil
import socket
import time

import pytest
import ray

from loram.errors import UserError
from loram.model import save
from pipelines.assets import home
from pipelines.check import check, check_gpu_memory, check_space
from pipelines.disk import run_bytes
from pipelines.full import main
from pipelines.graph import build
from pipelines.locate import locate
from pipelines.recipes import read
from pipelines.settings import check_settings
from pipelines.shapes import SHAPES
from pipelines.store import Store
from tests.conftest import tiny_model

ASSETS = home() / "assets"


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the main job with `test key=value ...`; the one line that it was refused with."""

    def run(*changes: str) -> str:
        capsys.readouterr()  # what the test itself printed
        started = time.monotonic()
        status = main(["test", f"store={tmp_path / 'store'}", *changes])
        captured = capsys.readouterr()
        assert status == 2 and not ray.is_initialized()
        assert time.monotonic() - started < 10
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        assert "; accepted: " in lines[0]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("sft.lrr=1", "sft.lrr"),
        ("sft.steps=two", "sft.steps"),
        ("prune.ratio=1", "prune.ratio"),
        ("prune.ratio=0.999", "prune.ratio"),
        ("prune.method=magnitude", "rand, stru"),
        ("prune.multiple=0", "1 or more"),
        ("prune.multiple=500", "prune.multiple: found 500"),
        ("prune.keep_first=4", "prune.keep_first + prune.keep_last"),
        ("sft.seq_len=100000", "sft.seq_len"),
        ("align.global_batch=6", "align.global_batch"),
        ("sft.steps=0", "sft.steps"),
        ("sft.lr=-1", "sft.lr"),
        ('compare=["dora"]', "lora, qlora"),
        ("place.gpus_per_worker=2", "0, 1"),
        ("instruct.rows=16", "17 or more"),  # of which 16 are held out
        ("instruct.rows=-5", "17 or more"),
        ("instruct.max_bad_share=1.5", "[0, 1]"),
        ("corpus.max_bad_share=-1", "[0, 1]"),
        ("corpus.rows=1", "by the weights none of"),
        ('corpus.sources=[{"path": "a.jsonl", "weight": 0}]', "corpus.sources: weight"),
        ('corpus.sources=[{"path": "a.jsonl", "weight": NaN}]', "corpus.sources: weight"),
        ('evaluate.in_domain=[{"path": "a.jsonl", "share": 1.5}]', "evaluate.in_domain: share"),
        ('adapter.targets=["q_proj", "downproj"]', "downproj"),
        ("adapter.targets=[]", "q_proj, k_proj"),
        ("experiment=", "experiment"),
        ("place.cpus_per_worker=4096", "4096 CPUs"),
        ("model=no/such-model-anywhere", "no/such-model-anywhere"),
        ("corpus.sources=[]", "corpus.sources"),
        ("compensate.rank=65", "0 (none) to 64"),
        ("compensate.data=web", "corpus, task, both"),
        ("compensate.damping=1e-9", "1e-6 or more"),
        ("distil.top=-1", "0 (none) to"),
        ("offset.every=-1", "0 or more"),
        ("offset.parts=0", "1 or more"),
    ],
)
def test_settings(refused, change, names):
    assert names in refused(change)


def test_settings_that_exclude_each_other(refused):
    assert "align.steps" in refused("distil.top=32", "align.steps=0")
    assert "bound with prune.method unst" in refused("prune.method=unst", 'compare=["bound"]')
    several = ("place.workers=8", "place.gpus_per_worker=1", "sft.global_batch=32")
    assert "8 GPUs" in refused(*several, "align.global_batch=32")
    fitted = ("compensate.rank=4", "compensate.gradients=true", "offset.every=2")
    assert "offset.every 1, or false" in refused(*fitted)


def test_a_training_that_is_not_done_may_have_any_batch():
    check_settings(read("test", ["align.steps=0", "align.global_batch=6"]))


def test_whole_layers_are_a_matter_of_the_structured_methods():
    four_layers = read("test", ["prune.method=semi", "prune.ratio=null", "prune.keep_first=4"])
    assert check_settings(four_layers).num_hidden_layers == 4


def source(setting: str, path) -> str:
    return f"{setting}=" + json.dumps([{"path": str(path)}])


@pytest.mark.parametrize("setting", ["corpus.sources", "instruct.sources"])
def test_files(refused, setting, tmp_path):
    assert "missing.jsonl" in refused(source(setting, tmp_path / "missing.jsonl"))
    assert "s3://, hf://" in refused(f'{setting}=[{{"path": "https://host/rows.jsonl"}}]')
    (tmp_path / "empty.jsonl").touch()
    assert "empty" in refused(source(setting, tmp_path / "empty.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)) * 64)
    assert "binary.jsonl" in refused(source(setting, tmp_path / "binary.jsonl"))
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 64)
    assert "binary.txt" in refused(source(setting, tmp_path / "binary.txt"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    assert "cut.parquet" in refused(source(setting, tmp_path / "cut.parquet"))
    (tmp_path / "other.jsonl").write_text('{"colour": "red"}\n' * 4)
    assert "colour" in refused(source(setting, tmp_path / "other.jsonl"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert "picture.png" in refused(source(setting, tmp_path / "picture.png"))


def test_a_source_that_would_give_no_row(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 4)
    path = str(tmp_path / "rows.jsonl")
    two = json.dumps([{"path": path, "weight": 1}, {"path": path, "weight": 500}])
    assert "evaluate.rows: found 100" in refused(
        f"evaluate.out_of_domain={two}", "evaluate.rows=100"
    )
    part = json.dumps([{"path": path, "share": 0.1}])
    assert "less than the smallest file" in refused(f"instruct.sources={part}")


def test_no_trainable_token(refused, tmp_path):
    rows = '{"instruction": "Say nothing.", "output": ""}\n' * 4
    (tmp_path / "silent.jsonl").write_text(rows)
    assert "silent.jsonl" in refused(source("instruct.sources", tmp_path / "silent.jsonl"))
    halves = rows.replace("nothing", "\\ud83d").replace('""', '"."')
    (tmp_path / "halves.jsonl").write_text(halves)  # of an emoji, as careless cutting leaves them
    assert "surrogates" in refused(source("instruct.sources", tmp_path / "halves.jsonl"))


def test_models(refused, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    assert "config.json" in refused(f"model={model}")
    save(tiny_model("llama"), model)
    assert "tokenizer" in refused(f"model={model}")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "tiny-llama" / file, model / file)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors, damaged" in refused(f"model={model}")
    (model / "model.safetensors").unlink()
    assert "without model.safetensors" in refused(f"model={model}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "'gpt2'" in refused(f"model={model}")
    quantised = config | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(quantised))
    assert "quantised or compressed" in refused(f"model={model}")
    (model / "config.json").write_text("{")
    assert "not JSON" in refused(f"model={model}")


def test_store(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "not writable" in refused(f"store={tmp_path / 'file' / 'store'}")


def test_in_a_cluster(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "RAY_ADDRESS" in refused()
    assert "store: found results; accepted: an absolute path" in refused("store=results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAM_HOME", "here")
    assert "LORAM_HOME: found here" in refused()


def test_disk_too_full(refused, tmp_path):
    """Offsets that no disk holds; what the run's own steps have taken is not asked for again."""
    words = ["offset.every=1", "sft.steps=10000000"]
    assert "GB free" in refused(*words)
    recipe, store = read("test", words), Store(tmp_path / "store")
    config = check(recipe, store.root)
    graph = build(recipe, *locate(recipe, store.root / "digests"))
    work = store.work(graph.pruned.slug)
    work.mkdir(parents=True)
    with (work / "most").open("wb") as file:
        file.truncate(run_bytes(recipe, config))  # a hole, which takes no room itself
    check_space(store, recipe, config, [graph.recovered])


def test_a_stage_that_no_gpu_holds():
    """By LLaMA-2-13B's shape: on one A100 all but alignment."""
    config, memory = SHAPES["llama2-13b"], 85_000_000_000
    check_gpu_memory(read("llama2-13b", ["place.workers=1", "align.steps=0"]), config, memory)
    check_gpu_memory(read("llama2-13b", []), config, memory)
    with pytest.raises(UserError, match="^GPU memory: found align, .* accepted: 85.0 GB; more"):
        check_gpu_memory(read("llama2-13b", ["place.workers=1"]), config, memory)


def test_tracking_server(refused):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert f"127.0.0.1:{port}" in refused(f"tracking=http://127.0.0.1:{port}")
