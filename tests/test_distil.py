"""Distilled alignment: the large model's targets, the loss on them, and what is trained."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import loram.layers
from loram.compensate import CompensateConfig, compensate
from loram.distil import (
    DistilConfig,
    DistilLoss,
    Targets,
    hidden_layers,
    target_bytes,
    write_targets,
)
from loram.loss import to_device
from loram.model import load, save
from loram.parallel import shard
from loram.prune import PruneConfig, choose, prune
from loram.taylor import random_scores
from loram.train import TrainConfig, train, train_all_
from tests.conftest import FAMILIES, tiny_model
from tests.test_sparse import rows

CPU = torch.device("cpu")
CUT = PruneConfig("rand", 0.5, keep_first=1, keep_last=1, seed=3)
CONFIG = DistilConfig(top=8, hidden_layers=2)


def numbered(seed: int = 2) -> list[dict[str, torch.Tensor]]:
    """Two batches of four rows, whose numbers are 30, 20, ..., as the large model sees them."""
    names = torch.arange(8).flip(0) * 10 + 30
    return [b | {"row": names[4 * n : 4 * n + 4]} for n, b in enumerate(rows(seed))]


def outputs(model, batch):
    given = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        return model(**given, use_cache=False, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_those_of_the_whole_model(family, tmp_path):
    """Any rows in any order; hidden states to float8's 3 bits after the leading one."""
    model = tiny_model(family)
    save(model, tmp_path / "base")
    (tmp_path / "out").mkdir()
    given = numbered()
    written = write_targets(
        tmp_path / "base", tmp_path / "out", given, CONFIG, work=tmp_path / "work"
    )
    assert hidden_layers(4, CONFIG) == [1, 3]
    positions = 8 * 48
    assert written["tokens"] == positions
    assert target_bytes(model.config, CONFIG, positions) == positions * (8 * 6 + 2 * (64 + 4))
    headers = written["bytes"] - target_bytes(model.config, CONFIG, positions)
    assert 0 < headers < 2 * 6 * 200
    found = Targets(tmp_path / "out").fetch(torch.tensor([100, 30, 70]))
    whole = [outputs(model, batch) for batch in given]
    for n, (batch, row) in enumerate([(0, 0), (1, 3), (0, 3)]):
        probs = whole[batch].logits[row].float().log_softmax(-1)
        top = probs.topk(8)
        assert (found["target_log_probs"][n] - top.values).abs().max() < 0.01
        taken = probs.gather(1, found["target_ids"][n])
        assert (taken - top.values).abs().max() < 0.01
        for k, i in enumerate((1, 3)):
            hidden = whole[batch].hidden_states[i][row]
            error = found["target_hidden"][n, k].float() - hidden
            assert (error.abs() < 0.08 * hidden.abs() + 1e-3 * hidden.abs().max()).all()
    with pytest.raises(KeyError):
        Targets(tmp_path / "out").fetch(torch.tensor([31]))


def test_what_comes_out_of_the_last_layer_is_none_of_the_hidden_states():
    """The final norm stands behind it; its targets are the next tokens."""
    assert [hidden_layers(n, DistilConfig()) for n in (1, 2, 3, 4, 32)] == [
        [],
        [1],
        [1, 2],
        [1, 2, 3],
        [8, 16, 24],
    ]


def test_the_loss_by_hand(tmp_path):
    """With the whole vocabulary kept it is the exact divergence; the large model has none."""
    save(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "out").mkdir()
    config = DistilConfig(top=128, hidden_layers=1, hidden_weight=0.5)
    write_targets(tmp_path / "base", tmp_path / "out", numbered(), config, work=tmp_path / "work")
    batch = numbered()[0]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :20] = -100
    given = to_device(batch | Targets(tmp_path / "out").fetch(batch["row"]), CPU)
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    found = DistilLoss(student, config)(**given)
    p, q = (outputs(m, batch).logits.double().log_softmax(-1) for m in (teacher, student))
    h, g = (outputs(m, batch).hidden_states[2].double() for m in (teacher, student))
    trained = batch["labels"][:, 1:] != -100
    divergence = (p.exp() * (p - q)).sum(-1)[:, :-1][trained].sum()
    apart = ((g - h).square().sum(-1) / h.square().sum(-1))[:, :-1][trained].sum()
    assert float(found) == pytest.approx(float(divergence + 0.5 * apart), rel=0.01)
    assert float(DistilLoss(teacher, config)(**given)) < 0.01 * float(found)
    del given["target_ids"], given["target_log_probs"], given["target_hidden"]
    next_ids = batch["input_ids"][:, 1:, None]
    nats = -q[:, :-1].gather(2, next_ids)[..., 0][trained].sum()
    assert float(DistilLoss(student, config)(**given)) == pytest.approx(float(nats), rel=1e-3)


def test_training_comes_nearer_and_changes_all_but_the_head(tmp_path):
    full = tiny_model("qwen2")
    save(full, tmp_path / "base")
    kept = choose(random_scores(full.config, 3), full.config, CUT)
    prune(tmp_path / "base", tmp_path / "pruned", kept)
    fitted = tmp_path / "base", tmp_path / "pruned", tmp_path / "small", rows(4)
    compensate(*fitted, CompensateConfig(rank=4))
    (tmp_path / "out").mkdir()
    write_targets(tmp_path / "base", tmp_path / "out", numbered(), CONFIG, work=tmp_path / "work")
    targets, model = Targets(tmp_path / "out"), load(tmp_path / "small", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    module = DistilLoss(train_all_(model), CONFIG)
    given = [b | targets.fetch(b["row"]) for b in numbered()] * 10
    logs = list(train(module, given, TrainConfig(10, 3e-3, 8, warmup_steps=1)))
    assert logs[-1].loss < 0.9 * logs[0].loss
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == set(before) - {"lm_head.weight"}


def stumbling(monkeypatch) -> list[int]:
    """Every batch is a part, and the disk is full when layer 1 is reached with the second; which
    layers were asked for."""
    asked, original = [], loram.layers.forward

    def forward(layers, i, *rest):
        asked.append(i)
        if asked == [0, 1, 2, 3, 0, 1]:
            raise OSError(28, "No space left on device")
        return original(layers, i, *rest)

    monkeypatch.setattr(loram.layers, "forward", forward)
    monkeypatch.setattr(loram.layers, "HELD", 1)
    return asked


def test_a_crash_half_way_goes_on_at_the_part(tmp_path, monkeypatch):
    """In parts or not, what is written is the same."""
    save(tiny_model("llama"), tmp_path / "base")
    asked = stumbling(monkeypatch)
    (tmp_path / "out").mkdir()
    arguments = tmp_path / "base", tmp_path / "out", numbered(), CONFIG
    bf16 = {"dtype": torch.bfloat16}  # as the pipeline calls it
    with pytest.raises(OSError, match="No space"):
        write_targets(*arguments, work=tmp_path / "work", **bf16)
    write_targets(*arguments, work=tmp_path / "work", **bf16)
    assert asked == [0, 1, 2, 3, 0, 1] + [0, 1, 2, 3]
    monkeypatch.undo()
    (tmp_path / "once").mkdir()
    write_targets(arguments[0], tmp_path / "once", *arguments[2:], work=tmp_path / "other", **bf16)
    for file in (tmp_path / "once").rglob("*.safetensors"):
        again = tmp_path / "out" / file.relative_to(tmp_path / "once")
        assert file.read_bytes() == again.read_bytes()


TRAIN = TrainConfig(3, 1e-3, 8, warmup_steps=1)


def one_of_two(rank: int, root: Path) -> None:
    """What each of two processes does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module = shard(DistilLoss(train_all_(load(root / "small")), CONFIG), CPU)
    given = []
    module.register_forward_pre_hook(
        lambda module, args, named: given.append(named), with_kwargs=True
    )
    targets, batch = Targets(root / "out"), numbered(5)[rank]
    mine = [batch | targets.fetch(batch["row"])] * 3
    losses = [log.loss for log in train(module, mine, TRAIN)]
    assert given[0]["target_log_probs"].dtype == torch.float32
    (root / f"losses-{rank}").write_text(json.dumps(losses))
    dist.destroy_process_group()


def test_two_processes_distil_as_one_does(tmp_path):
    """Towards targets as they are: FSDP2 would round them."""
    model = tiny_model("llama")
    save(model, tmp_path / "base")
    kept = choose(random_scores(model.config, 3), model.config, CUT)
    prune(tmp_path / "base", tmp_path / "small", kept)
    (tmp_path / "out").mkdir()
    write_targets(tmp_path / "base", tmp_path / "out", numbered(5), CONFIG, work=tmp_path / "work")
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    module = DistilLoss(train_all_(load(tmp_path / "small")), CONFIG)
    targets = Targets(tmp_path / "out")
    given = [b | targets.fetch(b["row"]) for b in numbered(5)] * 3
    alone = [log.loss for log in train(module, given, TRAIN)]
    for rank in (0, 1):
        together = json.loads((tmp_path / f"losses-{rank}").read_text())
        assert together == pytest.approx(alone, rel=2e-3)
