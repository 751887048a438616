"""Stand-ins fitted on gradients: their laws beside those that they share with values."""

import pytest
import torch

import loram.compensate
from loram.compensate import working_bytes
from loram.errors import UserError
from loram.fit_gradients import fit_gradients
from loram.layers import Layers, Spool
from loram.loss import CausalLoss
from loram.model import load
from loram.offsets import OffsetLoss, Offsets, write_offsets
from loram.ridge import VALUES, Moments, solve_both
from loram.shards import Checkpoint
from loram.subblocks import SubBlocks
from tests.compensated import EVERY, PRUNINGS, again, make, rows


def at_embeddings(model, module, batch, **offsets) -> torch.Tensor:
    """The gradient of the summed loss."""
    embedded = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_(True))
    )
    loss = module(*(batch[k] for k in ("input_ids", "labels", "position_ids")), **offsets)
    hook.remove()
    return torch.autograd.grad(loss, embedded[0])[0]


def gradient(root, small: str, batch) -> torch.Tensor:
    """With the small model where the large one is."""
    out = root / f"{small}-offsets"
    write_offsets(root / "base", root / small, out, [batch], 1, work=out / "work")
    offsets, model = Offsets(out), load(root / small, dtype=torch.float32)
    module = OffsetLoss(model, offsets.layers)
    return at_embeddings(model, module, batch, **offsets.fetch(batch["row"]))


@pytest.mark.parametrize(("family", "method"), PRUNINGS)
def test_the_gradient_is_nearer_to_the_large_model_s(family, method, tmp_path):
    """Than without stand-ins; no kept weight changes. Values of a random model, unlike a trained
    one's, tell its mean Jacobian as well: with those it is as near."""
    make(tmp_path, family, method, rank=64, offsets=range(1, 5))
    found = again(tmp_path, 64, "both", **EVERY)
    assert 0 < found["missing"] < 1 and found["tokens"] == 64 * 48
    large, batch = load(tmp_path / "base", dtype=torch.float32), rows(2, 64)[1]
    true = at_embeddings(large, CausalLoss(large), batch).flatten()
    cosine = {
        name: float(torch.cosine_similarity(gradient(tmp_path, name, batch).flatten(), true, dim=0))
        for name in ("pruned", "small", "both")
    }
    assert cosine["both"] > cosine["pruned"] and cosine["both"] > cosine["small"] - 0.01, cosine
    pruned, small = Checkpoint(tmp_path / "pruned"), Checkpoint(tmp_path / "both")
    for name in pruned.names():
        assert torch.equal(pruned.read(name), small.read(name))


def test_the_large_model_s_gradient_is_that_of_autograd(tmp_path):
    make(tmp_path, "qwen3")
    batches, spool = rows(2, 8), Spool(tmp_path / "spool")
    full, small = (SubBlocks(Layers(tmp_path / name)) for name in ("base", "pruned"))
    list(fit_gradients(full, small, batches, spool, [], rank=4, damping=1e-2))
    model = load(tmp_path / "base", dtype=torch.float32)
    for n, batch in enumerate(batches):
        true = at_embeddings(model, CausalLoss(model), batch)
        assert torch.allclose(spool.read_several("gradient-0", n)["large"], true, atol=1e-5)


def fit(x: torch.Tensor, missing: torch.Tensor) -> Moments:
    found = Moments(x.shape[1], torch.device("cpu"))
    found.add(x, missing)
    return found


def test_full_rank_solves_the_equation_and_less_is_the_nearest_in_both_metrics():
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Moments:
        x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
        return fit(x, torch.randn(400, 24, generator=generator) + 0.1 * x)

    forward, backward, scale = drawn(), drawn(), 300.0

    def damped(gram, weight):
        gram = weight * gram.double()
        return gram + 1e-2 * gram.diagonal().mean() * torch.eye(24)

    weights = VALUES / scale, 1 / backward.square
    a, b = damped(forward.gram, weights[0]), damped(backward.gram, weights[1])
    r = weights[0] * forward.cross.double() + weights[1] * backward.cross.double().T
    p, q = solve_both(forward, backward, scale, 24, 1e-2)
    c = p @ q
    assert (a @ c + c @ b - r).abs().max() < 1e-6 * r.abs().max()
    p, q = solve_both(forward, backward, scale, 5, 1e-2)
    assert p.shape == (24, 5) and q.shape == (5, 24)
    k, m = torch.linalg.cholesky(a), torch.linalg.cholesky(b)
    left = (k.T @ (c - p @ q) @ m).square().sum()
    best = torch.linalg.svdvals(k.T @ c @ m)[5:].square().sum()
    assert float(left) == pytest.approx(float(best), rel=1e-6)


def test_where_slope_and_secant_differ_it_is_the_slope():
    """x is far to one side or the other, where f is flat. And where nothing is missing forward, nor
    has f a scale, it is the backward side alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator).sign()
    x += 0.1 * torch.randn(400, 8, generator=generator)
    g = torch.randn(400, 8, generator=generator)
    secant, slope = fit(x, 2 * x), fit(g, 0.1 * g)
    p, q = solve_both(secant, slope, secant.square, 8, 1e-6)
    assert (p @ q - 0.1 * torch.eye(8)).norm() < 0.2 * (p @ q - 2 * torch.eye(8)).norm()
    for scale in (0.0, secant.square):
        p, q = solve_both(fit(1e-4 * x, 0 * x), slope, scale, 8, 1e-6)
        assert torch.allclose(p @ q, 0.1 * torch.eye(8).double(), atol=1e-3)


def test_a_crash_half_way_goes_on_at_the_sub_block(tmp_path, monkeypatch):
    make(tmp_path, "llama", **EVERY)
    done, original = [], loram.compensate.write_part

    def write_part(out, part, tensors):
        if part == "model.layers.1.self_attn" and "crash" not in done:
            done.append("crash")
            raise OSError(28, "No space left on device")
        done.append(part)
        original(out, part, tensors)

    monkeypatch.setattr(loram.compensate, "write_part", write_part)
    options = {**EVERY, "work": tmp_path / "work"}
    with pytest.raises(OSError, match="No space"):
        again(tmp_path, 4, "again", **options)
    again(tmp_path, 4, "again", **options)
    assert done[done.index("crash") + 1] == "model.layers.1.self_attn"
    assert done.count("model.layers.1.mlp") == 1
    for file in (tmp_path / "small").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not list((tmp_path / "work").iterdir())


def test_without_offsets_everywhere_it_is_refused(tmp_path):
    make(tmp_path, "llama")
    with pytest.raises(UserError, match="compensate.gradients.*after 2 layers.*all 4"):
        again(tmp_path, 4, "x", gradients=True, offsets=[2, 4])


@pytest.mark.parametrize("gradients", [True, False])
def test_it_takes_as_much_disk_as_was_said(gradients, tmp_path, monkeypatch):
    make(tmp_path, "llama")
    work, held, original = tmp_path / "work", [], Spool.write_several

    def write_several(self, name, batches):
        def counted():
            for batch in batches:
                yield batch
                held.append(sum(f.stat().st_size for f in work.rglob("*.safetensors")))

        original(self, name, counted())

    monkeypatch.setattr(Spool, "write_several", write_several)
    again(tmp_path, 4, "again", work=work, **EVERY | {"gradients": gradients})
    config = load(tmp_path / "base").config
    said = working_bytes(config, gradients, 64 * 48)
    assert 0.8 * said < max(held) < 1.02 * said
