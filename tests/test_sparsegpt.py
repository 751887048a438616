"""SparseGPT on one matrix, against its definition."""

import pytest
import torch

import loram.sparsegpt
from loram.errors import UserError
from loram.prune import PruneConfig, pattern, ratio
from loram.sparsegpt import Hessian, Pattern, factor, sparsify_

UNST = Pattern(0.5)
N_M = [Pattern(0.5, 4, 8), Pattern(0.5, 2, 4), Pattern(1 / 3, 1, 3)]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the inputs of a layer, correlated with one another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ (mixing + torch.eye(columns))
    return torch.randn(rows, columns, generator=generator), inputs


def hessian(inputs: torch.Tensor) -> torch.Tensor:
    gathered = Hessian(inputs.shape[1], torch.device("cpu"))
    for part in inputs.chunk(3):
        gathered.add(part[None])
    return gathered.matrix


def by_definition(weight, inputs, removed: Pattern, block=128, damping=0.01):
    """Column by column in float64; the inverse of what is left is taken anew at every column."""
    w, h = weight.double().clone(), inputs.double().T @ inputs.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    keep = torch.ones_like(w, dtype=torch.bool)
    inverse_diagonal = [float(torch.linalg.inv(h[i:, i:])[0, 0]) for i in range(len(h))]
    saliency_scale = torch.tensor(inverse_diagonal, dtype=torch.float64)
    for i in range(w.shape[1]):
        if removed.group and i % removed.group == 0:
            near = slice(i, i + removed.group)
            lowest = (w[:, near] ** 2 / saliency_scale[near]).argsort(1)[:, : removed.zeros]
            keep[:, near] = keep[:, near].scatter(1, lowest, False)
        if not removed.group and i % block == 0:
            near = slice(i, i + block)
            saliency = w[:, near] ** 2 / saliency_scale[near]
            count = int(saliency.numel() * removed.ratio)
            chosen = torch.ones(saliency.numel(), dtype=torch.bool)
            chosen[saliency.flatten().argsort()[:count]] = False
            keep[:, near] = chosen.view_as(saliency)
        inverse = torch.linalg.inv(h[i:, i:])
        error = w[:, i] * ~keep[:, i] / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
        w[:, i] *= keep[:, i]
    return w, keep


def gap(removed: Pattern, columns: int = 264) -> float:
    weight, inputs = problem(6, columns)
    if removed.group == 3:
        weight, inputs = weight[:, :258], inputs[:, :258]
    expected, keep = by_definition(weight, inputs, removed)
    found = weight.clone()
    upper, dead, damping = factor(hessian(inputs))
    mask = sparsify_(found, upper, dead, removed)
    assert damping == 0.01 and not dead.any()
    if not torch.equal(mask, keep):
        return float("inf")
    return float((found - expected).abs().max())


@pytest.mark.parametrize("removed", [UNST, Pattern(0.55), *N_M])
def test_against_the_definition(removed):
    assert gap(removed) < 1e-3


def test_another_block_size_chooses_other_weights(monkeypatch):
    """Unstructured pruning ranks the weights of 128 columns together: that is part of it."""
    monkeypatch.setattr(loram.sparsegpt, "BLOCK", 64)
    assert gap(UNST) > 1e-2


def test_the_error_goes_to_the_columns_after(monkeypatch):
    """Without it SparseGPT is magnitude pruning by column norms, and the law notices."""

    def diagonal_alone(matrix):
        upper, dead, damping = loram.sparsegpt.factor(matrix)
        return torch.diag(upper.diagonal()), dead, damping

    monkeypatch.setitem(globals(), "factor", diagonal_alone)
    assert gap(UNST) > 1e-2


@pytest.mark.parametrize("size", [1, 2, 7, 256, 301])
def test_the_factor_is_that_of_the_damped_inverse(size):
    matrix = hessian(problem(1, size)[1])
    damped = matrix.double() + 0.01 * matrix.diagonal().mean() * torch.eye(size)
    upper, _, damping = factor(matrix)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert damping == 0.01 and not upper.tril(-1).any()
    assert (upper - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_hessian_that_is_not_finite_is_refused():
    matrix = hessian(problem(1, 8)[1])
    matrix[3, 3] = float("inf")
    with pytest.raises(ValueError, match="NaN or Inf in the second moments"):
        factor(matrix)


@pytest.mark.parametrize("removed", [UNST, *N_M[:2]])
def test_identity_hessian_is_magnitude_pruning(removed):
    weight, _ = problem(7, 264)
    found = weight.clone()
    upper, dead, _ = factor(torch.eye(264))
    mask = sparsify_(found, upper, dead, removed)
    assert torch.equal(found, weight * mask)
    for start in range(0, 264, 128):
        near = slice(start, start + 128)
        kept, gone = weight[:, near][mask[:, near]].abs(), weight[:, near][~mask[:, near]].abs()
        if removed.group:
            groups = weight[:, near].abs().unflatten(1, (-1, removed.group))
            lowest = groups.argsort(-1)[..., : removed.zeros].sort(-1).values
            zeros = (~mask[:, near]).unflatten(1, (-1, removed.group)).nonzero()[:, 2]
            assert torch.equal(zeros.view_as(lowest), lowest)
        else:
            assert gone.max() <= kept.min()


@pytest.mark.parametrize("removed", [UNST, Pattern(0.55), *N_M[:2]])
def test_as_many_survive_as_the_plan_says(removed):
    weight, inputs = problem(6, 264)
    mask = sparsify_(weight, *factor(hessian(inputs))[:2], removed)
    assert int(mask.sum()) == removed.survivors(6, 264)
    assert torch.equal(weight == 0, ~mask)


def test_a_hessian_that_is_not_positive_definite_is_damped_more():
    """Inputs that are the same up to rounding, and large: 0.01 of the mean is then not enough."""
    matrix = torch.ones(64, 64)
    matrix[0, 1] = matrix[1, 0] = 1.5  # no Hessian could be this; the rounding of one can
    weight = torch.randn(4, 64)
    upper, dead, damping = factor(matrix)
    assert damping > 0.01 and upper.isfinite().all()
    sparsify_(weight, upper, dead, UNST)
    assert weight.isfinite().all()


def test_inputs_that_are_always_zero_lose_their_weights():
    weight, inputs = problem(6, 128)
    inputs[:, 5] = 0
    upper, dead, _ = factor(hessian(inputs))
    sparsify_(weight, upper, dead, UNST)
    assert dead.nonzero().flatten().tolist() == [5] and not weight[:, 5].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PruneConfig("semi", 0.65), "prune.ratio: found 0.65; accepted: 0.5, which is 4:8"),
        (PruneConfig("semi", pattern="8:4"), "prune.pattern: found '8:4'"),
        (PruneConfig("semi", pattern="half"), "prune.pattern: found 'half'"),
        (PruneConfig("unst", 1.0), r"prune.ratio: found 1.0; accepted: a number in \[0, 1\)"),
    ],
)
def test_what_no_method_can_do_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        pattern(config)


def test_each_method_has_the_ratio_of_the_paper():
    found = [ratio(PruneConfig(method)) for method in ("rand", "stru", "semi", "unst")]
    assert found == [0.65, 0.65, 0.5, 0.55]
    assert ratio(PruneConfig("semi", pattern="1:4")) == 0.25
