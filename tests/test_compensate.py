"""Compensation: its laws on every model family and every pruning, through files."""

import pytest
import torch

import loram.compensate
import loram.fit_values
from loram.compensate import CompensateConfig, compensate
from loram.errors import UserError
from loram.kept import Kept
from loram.model import save
from loram.prune import prune
from loram.ridge import Moments
from loram.shards import Checkpoint
from tests.compensated import EVERY, PRUNINGS, again, distance, make, rows
from tests.conftest import FAMILIES, tiny_model

NEAR_ZERO = 1e-9  # damping


@pytest.mark.parametrize("fit", [{}, EVERY], ids=["values", "gradients"])
@pytest.mark.parametrize("family", FAMILIES)
def test_linear_attention_is_made_up_for_exactly(family, fit, tmp_path):
    """In documents of one token attention is linear in its input: the compensated model is the
    large one."""
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.bias", "o_proj.bias")):
            parameter.data.zero_()  # linear, not affine
    save(model, tmp_path / "base")
    whole = Kept.whole(model.config)
    kept = Kept((torch.tensor([1, 3]),) * 4, whole.neurons)
    prune(tmp_path / "base", tmp_path / "pruned", kept)
    again(tmp_path, 64, batches=rows(2, 64, document=1), damping=NEAR_ZERO, **fit)
    before = distance(tmp_path, tmp_path / "pruned", document=1)
    assert before > 0.01
    assert distance(tmp_path, tmp_path / "small", document=1) < 1e-6 * before


@pytest.mark.parametrize("fit", [{}, EVERY], ids=["values", "gradients"])
@pytest.mark.parametrize("method", ["rand", "semi", "unst"])
def test_a_linear_model_is_made_up_for_exactly(method, fit, tmp_path):
    """With gates that do not depend on the input the MLP is linear too; every pruning."""
    model = tiny_model("llama", mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_proj.weight", "v_proj.bias", "up_proj.bias")):
            parameter.data.zero_()
    options = {"batches": rows(2, 64, document=1), "damping": NEAR_ZERO, **fit}
    make(tmp_path, "llama", method, rank=64, model=model, **options)
    before = distance(tmp_path, tmp_path / "pruned", document=1)
    assert before > 0.01
    assert distance(tmp_path, tmp_path / "small", document=1) < 1e-6 * before


def test_behind_an_offset_nothing_is_missing_from_before(tmp_path):
    """Layer 2's stand-ins are then those of a model that is whole before it."""
    make(tmp_path, "llama")  # cuts layers 1 and 2
    again(tmp_path, 4, "offsets", offsets=[2, 4])
    for cut in (1, 2):  # layers numbered from 0
        whole, kept = Kept.whole(tiny_model("llama").config), Kept.load(tmp_path / "pruned")

        def mixed(name, cut=cut, whole=whole, kept=kept):
            parts = zip(getattr(kept, name), getattr(whole, name), strict=True)
            return tuple(one if i == cut else other for i, (one, other) in enumerate(parts))

        alone = Kept(mixed("kv_heads"), mixed("neurons"))
        prune(tmp_path / "base", tmp_path / f"pruned-{cut}", alone)
        few = CompensateConfig(rank=4)
        compensate(
            tmp_path / "base", tmp_path / f"pruned-{cut}", tmp_path / f"{cut}", rows(2, 64), few
        )

    def stand_in(model, layer):
        name = f"model.layers.{layer}.self_attn.stand_in"
        stored = Checkpoint(tmp_path / model)
        return stored.read(f"{name}.P") @ stored.read(f"{name}.Q")

    assert torch.allclose(stand_in("offsets", 1), stand_in("1", 1), atol=1e-5)
    assert torch.allclose(stand_in("offsets", 2), stand_in("2", 2), atol=1e-5)
    assert not torch.allclose(stand_in("small", 2), stand_in("2", 2), atol=1e-3)


@pytest.mark.parametrize(("family", "method"), PRUNINGS)
def test_kept_weights_stay_and_more_rank_is_nearer(family, method, tmp_path):
    found = make(tmp_path, family, method)
    again(tmp_path, 64, "wide")
    pruned, small = Checkpoint(tmp_path / "pruned"), Checkpoint(tmp_path / "small")
    for name in pruned.names():
        assert torch.equal(pruned.read(name), small.read(name))
    added = set(small.names()) - set(pruned.names())
    layers = range(1, 3) if method == "rand" else range(4)
    assert added == {
        f"model.layers.{i}.{block}.stand_in.{x}"
        for i in layers
        for block in ("self_attn", "mlp")
        for x in "PQ"
    }
    assert 0 < found["missing"] < 1 and found["tokens"] == 64 * 48
    distances = [distance(tmp_path, tmp_path / name) for name in ("pruned", "small", "wide")]
    assert distances == sorted(distances, reverse=True) and distances[2] < 0.9 * distances[0]


def test_full_rank_is_the_unreduced_fit():
    """And a lower rank is the best of that rank in the metric of the output."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator)
    x = torch.randn(400, 24, generator=generator) @ mix
    missing = torch.randn(400, 24, generator=generator) + 0.1 * x @ mix
    fit = Moments(24, torch.device("cpu"))
    fit.add(x[:100], missing[:100])
    fit.add(x[100:], missing[100:])
    gram = (x.T @ x).double()
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(24)
    c = torch.linalg.solve(gram, (x.T @ missing).double())
    p, q = fit.solve(24, 1e-2)
    assert (p @ q - c).abs().max() < 1e-4 * c.abs().max()
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(lower.T @ c)
    best = torch.linalg.solve(lower.T, u[:, :5] * s[:5]) @ v[:5]
    p, q = fit.solve(5, 1e-2)
    assert (p @ q - best).abs().max() < 1e-4 * best.abs().max()
    left = (missing - x @ (p @ q).float()).square().sum() / missing.square().sum()
    assert fit.share_left(p, q) == pytest.approx(float(left), rel=1e-4)


def test_the_fit_follows_the_large_model_not_the_layer_alone(tmp_path, monkeypatch):
    """What earlier layers still miss is made up for too: without it the result is further away."""
    make(tmp_path, "llama", rank=64)
    streams = loram.fit_values._Streams

    def large(self, number):
        for n, batch in enumerate(self.batches):
            yield self.full.after(number, self.read(f"small-{number}", n), batch)

    with monkeypatch.context() as patched:
        patched.setattr(streams, "large", large)
        again(tmp_path, 64, "alone")
    near, alone = (distance(tmp_path, tmp_path / name) for name in ("small", "alone"))
    assert near < alone


def test_padding_is_not_fitted_on(tmp_path):
    make(tmp_path, "llama", batches=rows(2, 64))
    padded = []
    for batch in rows(2, 64):
        pad = {"input_ids": 0, "labels": -100, "position_ids": 0}
        more = {name: torch.full((32, 9), value) for name, value in pad.items()}
        padded.append({name: torch.cat([batch[name], more[name]], 1) for name in pad})
    found = again(tmp_path, 4, "padded", batches=padded)
    assert found["tokens"] == 64 * 48
    first, second = Checkpoint(tmp_path / "small"), Checkpoint(tmp_path / "padded")
    for name in first.names():
        assert torch.allclose(first.read(name), second.read(name), atol=1e-4)


def test_a_crash_half_way_goes_on_at_the_sub_block(tmp_path, monkeypatch):
    make(tmp_path, "llama", "semi")
    done, original = [], loram.compensate.write_part

    def write_part(out, part, tensors):
        if part == "model.layers.2.mlp" and "crash" not in done:
            done.append("crash")
            raise OSError(28, "No space left on device")
        done.append(part)
        original(out, part, tensors)

    monkeypatch.setattr(loram.compensate, "write_part", write_part)
    with pytest.raises(OSError, match="No space"):
        again(tmp_path, 4, "again", work=tmp_path / "work")
    assert not (tmp_path / "again").exists()
    again(tmp_path, 4, "again", work=tmp_path / "work")
    assert done[done.index("crash") + 1] == "model.layers.2.mlp"
    assert done.count("model.layers.1.mlp") == 1
    for file in (tmp_path / "small").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_bad_input_is_named(tmp_path):
    make(tmp_path, "llama")
    with pytest.raises(ValueError, match="no token to predict"):
        compensate(tmp_path / "base", tmp_path / "pruned", tmp_path / "x", [], CompensateConfig(4))
    first = {**rows(2)[0]}
    first["labels"] = first["labels"].clone()
    first["labels"][:, 1:] = -100  # what no position predicts
    with pytest.raises(ValueError, match="no token to predict"):
        again(tmp_path, 4, "x", batches=[first])
    with pytest.raises(UserError, match="compensate.rank: found 0"):
        again(tmp_path, 0, "x")
    with pytest.raises(UserError, match="compensated already"):
        compensate(
            tmp_path / "base", tmp_path / "small", tmp_path / "x", rows(2), CompensateConfig(4)
        )
