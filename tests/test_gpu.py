"""On a CUDA GPU: what is computed there is what the CPU computes, for every kind of small model."""

import pytest
import torch

from loram.adapter import AdapterConfig, attach, open_adapted, recover, save_adapter
from loram.by_row import from_float8
from loram.model import load, save
from loram.offsets import OffsetLoss, Offsets, write_offsets
from loram.prune import PruneConfig
from loram.shards import Checkpoint
from loram.sparse import compress, sparsify
from loram.taylor import taylor_scores
from loram.train import TrainConfig, train
from tests import compensated
from tests.conftest import tiny_model
from tests.sparse_models import rows

pytestmark = pytest.mark.gpu
ADAPTER = AdapterConfig(r=4, dropout=0.0)
KINDS = ["bf16", "nf4", "compressed", "compressed nf4"]


def both(compute, tmp_path) -> list:
    """What it gives on the CPU and on the GPU, each in a directory of its own."""
    found = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        found.append(compute(device, tmp_path / device))
    return found


def near(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    return float((a - b).norm()) <= share * float(b.norm())


def small(kind: str, root):
    """root/base and the model that is trained: compensated, or single weights, in 4 or 16 bits."""
    if "compressed" in kind:
        compensated.make(root, "llama", "semi")
        compress(root / "small", root / "trained", nf4="nf4" in kind)
    else:
        compensated.make(root, "llama")
        save(load(root / "small", nf4=kind == "nf4"), root / "trained")
    return root / "base", root / "trained"


def test_scores_prunings_and_stand_ins(tmp_path):
    save(tiny_model("qwen3"), tmp_path / "base")
    scores = both(
        lambda device, out: taylor_scores(tmp_path / "base", rows(2), work=out, device=device),
        tmp_path,
    )
    for name in ("kv_heads", "neurons"):
        cpu, gpu = (getattr(found, name) for found in scores)
        assert near(gpu, cpu, 0.01)

    def sparse(device, out):
        options = {"work": out, "device": device}
        sparsify(tmp_path / "base", out / "sparse", rows(2), PruneConfig("semi"), **options)
        return out / "sparse"

    def fitted(device, out):
        compensated.make(out, "llama", device=device)
        return out / "small"

    for compute in (sparse, fitted):
        (tmp_path / compute.__name__).mkdir()
        there = [Checkpoint(path) for path in both(compute, tmp_path / compute.__name__)]
        for name in there[0].names():
            assert near(*(found.read(name).float() for found in there), 0.02), name


def test_stand_ins_on_gradients(tmp_path):
    def fitted(device, out):
        given = {"gradients": True, "offsets": range(1, 5), "device": device}
        compensated.make(out, "llama", **given)
        return Checkpoint(out / "small")

    cpu, gpu = both(fitted, tmp_path)
    for name in cpu.names():
        if name.endswith("stand_in.P"):
            one, other = (x.read(name) @ x.read(f"{name[:-1]}Q") for x in (cpu, gpu))
            assert near(other, one, 0.02), name


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_and_a_training(kind, tmp_path):
    """The same offsets, the same losses; then the adapter, recovered, on the GPU."""
    base, trained = small(kind, tmp_path)

    def run(device, out):
        options = {"work": out / "work", "device": device, "dtype": torch.bfloat16}
        write_offsets(base, trained, out, rows(5), 2, **options)
        offsets = Offsets(out)
        model = attach(load(trained, device=device), ADAPTER)
        module = OffsetLoss(model, offsets.layers)
        given = [batch | offsets.fetch(batch["row"]) for batch in rows(5)] * 3
        config = TrainConfig(3, 1e-2, 8, warmup_steps=1)
        losses = torch.tensor([log.loss for log in train(module, given, config)])
        save_adapter(model, out / "adapter")
        kept = offsets.fetch(torch.arange(8))
        return from_float8({x: kept[f"offset_{x}"] for x in ("values", "scale")}), losses

    (cpu, before), (gpu, after) = both(run, tmp_path)
    assert near(gpu, cpu, 0.05)
    assert before[-1] < before[0] and torch.allclose(before, after, rtol=0.01)
    recover(tmp_path / "cuda" / "adapter", tmp_path / "pruned", base, tmp_path / "recovered")
    opened = open_adapted(base, tmp_path / "recovered", device="cuda")
    assert next(opened.parameters()).is_cuda
