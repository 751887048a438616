"""Training on a real Ray: what is streamed, what is recorded, what is written."""

import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train.torch
import torch
from conftest import tiny_model
from peft import PeftModel
from rows import packed_rows

import pipelines.stream
from loram.adapter import AdapterConfig
from loram.errors import UserError
from loram.evaluate import perplexity
from loram.masks import of_weights
from loram.model import load, save
from loram.offsets import OffsetLoss, Offsets, write_offsets
from loram.packing import Packed, batches, order
from loram.train import TrainConfig
from pipelines.cluster import start_ray
from pipelines.fit import fit, latest_checkpoint
from pipelines.lock import try_lock, wait_lock
from pipelines.place import Place
from pipelines.stream import stream
from pipelines.worker import RUN, TRAINING
from tests.sparse_models import UNST, make

CONFIG = TrainConfig(
    steps=6, lr=1e-2, global_batch=8, seq_len=64, warmup_steps=2, eval_every=2, seed=5
)


@pytest.fixture(scope="module")
def cluster():
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    packed_rows(root / "train")
    packed_rows(root / "held_out", documents=15)  # rows that two workers cannot share equally
    save(tiny_model("llama").to(torch.bfloat16), root / "model")
    return root


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Watched(Packed):
    """Packed rows that note in a file how many were read."""

    def fetch(self, row_ids):
        with (self.path / "read").open("a") as file:
            file.write(f"{len(row_ids)}\n")
        return super().fetch(row_ids)


def test_rows_come_as_asked_and_not_long_before(cluster, data, monkeypatch):
    monkeypatch.setattr(pipelines.stream, "AHEAD", 2**20)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker can import tests
    packed = Watched(data / "train")
    ids = order(packed.rows, 64 * 200, seed=1)
    rows = stream(packed, ids, 7)
    for batch, expected in zip(rows, batches(packed, ids[: 7 * 30], 7), strict=False):
        assert batch.keys() == expected.keys()
        for name, tensor in batch.items():
            assert tensor.dtype == torch.int64 and torch.equal(tensor, expected[name])
    time.sleep(2)  # for as much as would be read now
    seen = (packed.path / "read").read_text()
    assert 7 * 30 <= sum(map(int, seen.split())) < len(ids) / 4
    rows.close()


def test_two_workers_take_the_rows_of_one(cluster, data, tmp_path):
    found = {}
    for workers in (1, 2):
        found[workers] = fit(
            "sft",
            model=data / "model",
            train=data / "train",
            held_out=data / "held_out",
            config=CONFIG,
            adapter=AdapterConfig(dropout=0.0),
            place=Place(workers=workers, cpus_per_worker=1, micro_batch=2),
            out=tmp_path / f"out{workers}",
            work=tmp_path / f"work{workers}",
        )
    alone = [line["rows"] for line in lines(tmp_path / "work1" / "rows-0.jsonl")]
    shares = [lines(tmp_path / "work2" / f"rows-{rank}.jsonl") for rank in (0, 1)]
    assert [a["rows"] + b["rows"] for a, b in zip(*shares, strict=True)] == alone
    packed = Packed(data / "train")
    assert sum(alone, []) == order(packed.rows, 48, CONFIG.seed).tolist()

    curves = [lines(tmp_path / f"work{workers}" / "metrics.jsonl") for workers in (1, 2)]
    for one, two in zip(*curves, strict=True):
        name = "loss" if "loss" in one else "held_out_loss"
        assert one["step"] == two["step"] and one[name] == pytest.approx(two[name], rel=1e-3)
    held_out = {line["step"]: line["held_out_loss"] for line in curves[0] if "lr" not in line}
    assert held_out.keys() == {2, 4, 6}

    # The best checkpoint is what is written, as a stock adapter.
    first = found[1]
    assert first["held_out_loss"] == held_out[first["best_step"]] == min(held_out.values())
    assert first["tokens"] == pytest.approx(48 * 64 * (1 - packed.info["padding"]), rel=0.01)
    assert first["trained_tokens"] == found[2]["trained_tokens"] > 0
    assert {file.name for file in (tmp_path / "out1").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "out1" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(data / "model")
    model = PeftModel.from_pretrained(load(data / "model"), tmp_path / "out1")
    kept = Packed(data / "held_out")
    again = perplexity(model, batches(kept, np.arange(kept.rows), 2))
    assert again["loss"] == pytest.approx(first["held_out_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_training_in_two_parts_is_the_same(cluster, data, tmp_path):
    common = {
        "model": data / "model",
        "train": data / "train",
        "held_out": data / "held_out",
        "adapter": AdapterConfig(),
        "place": Place(cpus_per_worker=1, micro_batch=2),
    }

    def trained(name, stop=None, **options):
        config = dataclasses.replace(CONFIG, stop=stop)
        places = {"out": tmp_path / name, "work": tmp_path / f"{name}-work"}
        return fit("sft", config=config, **common, **places, **options)

    whole = trained("whole")
    trained("first", stop=3)
    second = trained("second", earlier=tmp_path / "first")
    # A crash tore what Ray Train keeps: the part begins again, where the first ended.
    trained("torn", stop=4, earlier=tmp_path / "first")
    (tmp_path / "torn-work" / RUN / "checkpoint_manager_snapshot.json").write_text("{")
    trained("torn", earlier=tmp_path / "first")
    written = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("whole", "second", "torn")
    ]
    assert written[0] == written[1] == written[2]
    same = ("held_out_loss", "final_held_out_loss", "tokens", "trained_tokens")
    assert [whole[name] for name in same] == [second[name] for name in same]
    curve = lines(tmp_path / "torn-work" / "metrics.jsonl")
    assert [line["step"] for line in curve if "held_out_loss" in line] == [2, 3, 4, 6]
    # Where the first part ended is not where it was best, if it got worse again.
    assert latest_checkpoint(tmp_path / "first").name == "step-000003"
    assert not list((tmp_path / "first").rglob("*.lock"))


@pytest.mark.slow
def test_offsets_reach_both_workers(cluster, data, tmp_path):
    """Before it has learnt the small model has the losses that it has with them alone."""
    large = load(data / "model")
    large.model.layers.load_state_dict(tiny_model("llama", seed=1).model.layers.state_dict())
    save(large, tmp_path / "large")
    for part in ("train", "held_out"):
        packed = Packed(data / part)
        rows = list(batches(packed, range(packed.rows), 4))
        made = tmp_path / "offsets" / part
        given = tmp_path / "large", data / "model", made, rows, 2
        write_offsets(*given, work=tmp_path / part, dtype=torch.bfloat16)
    fit(
        "sft",
        model=data / "model",
        train=data / "train",
        held_out=data / "held_out",
        config=dataclasses.replace(CONFIG, steps=2, lr=1e-9),
        adapter=AdapterConfig(dropout=0.0),
        place=Place(workers=2, cpus_per_worker=1, micro_batch=2),
        out=tmp_path / "out",
        work=tmp_path / "work",
        offsets=tmp_path / "offsets",
    )
    curve = lines(tmp_path / "work" / "metrics.jsonl")
    for part, ids in (
        ("train", order(Packed(data / "train").rows, 16, CONFIG.seed)[:8]),
        ("held_out", range(Packed(data / "held_out").rows)),
    ):
        offsets = Offsets(tmp_path / "offsets" / part)
        rows = list(batches(Packed(data / part), ids, 2))
        corrected = [row | offsets.fetch(row["row"]) for row in rows]
        small = load(data / "model")
        alone = perplexity(small, rows)["loss"]
        there = perplexity(OffsetLoss(small, offsets.layers), corrected)["loss"]
        name = "loss" if part == "train" else "held_out_loss"
        found = next(line[name] for line in curve if name in line)
        assert abs(found - there) < 0.05 * abs(found - alone)


@pytest.mark.slow
def test_a_sparse_model_is_aligned_with_its_holes(cluster, data, tmp_path):
    """Divided over two workers; what is written has zeros where the masks say, and the masks."""
    make("qwen2", tmp_path, UNST)
    fit(
        "align",
        model=tmp_path / "pruned",
        train=data / "train",
        held_out=data / "held_out",
        config=CONFIG,
        adapter=None,
        place=Place(workers=2, cpus_per_worker=1, micro_batch=2),
        out=tmp_path / "out",
        work=tmp_path / "work",
    )
    before, after = load(tmp_path / "pruned"), load(tmp_path / "out")
    masks = of_weights(after, tmp_path / "out")
    assert len(masks) == 4 * 7
    for weight, mask in masks.items():
        assert torch.equal(weight == 0, ~mask)
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)


def test_one_training_at_a_time_writes_a_work_directory(cluster, data, tmp_path, monkeypatch):
    """The workers of a killed driver may live on: a training waits for them, and locks out others
    as long as its own live."""
    file, held = tmp_path / "work" / TRAINING, []
    training = {
        "model": data / "model",
        "train": data / "train",
        "held_out": data / "held_out",
        "config": CONFIG,
        "adapter": AdapterConfig(),
        "place": Place(cpus_per_worker=1, micro_batch=2),
        "out": tmp_path / "out",
        "work": tmp_path / "work",
    }
    free = threading.Timer(1.0, wait_lock(file).release)
    free.start()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="begun"):
        patch.setattr(ray.train.torch, "TorchTrainer", begun)
        fit("sft", **training)
    assert not free.is_alive()

    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            if lock := try_lock(file):
                lock.release()
            else:
                held.append(time.time())

    watcher = threading.Thread(target=watch)
    watcher.start()
    fit("sft", **training)
    done.set()
    watcher.join()
    steps = [line["time"] for line in lines(tmp_path / "work" / "metrics.jsonl")]
    assert held[0] <= steps[0] and held[-1] >= steps[-2]


def begun(*args, **options):
    raise ValueError("begun")


def test_a_quantised_model_is_not_aligned(data, tmp_path):
    save(load(data / "model", nf4=True), tmp_path / "nf4")
    with pytest.raises(UserError, match="align: found a 4-bit model.*quantise after alignment"):
        fit(
            "align",
            model=tmp_path / "nf4",
            train=data / "train",
            held_out=data / "held_out",
            config=CONFIG,
            adapter=None,
            place=Place(workers=2),
            out=tmp_path / "out",
            work=tmp_path / "work",
        )
