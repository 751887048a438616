"""SparseGPT (Frantar and Alistarh, 2023): remove single weights, and let the others make up for it.

For one matrix at a time, from the second moments of its inputs. `sparsify_` is the algorithm;
`Hessian` gathers what it needs; a `Pattern` says what is removed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loram.errors import refuse

BLOCK = 128  # columns between two updates of all columns to their right
DAMPING = 0.01  # of the mean of the Hessian's diagonal


@dataclass(frozen=True)
class Pattern:
    """What to remove: `zeros` in every group of `group` consecutive inputs of a row (n:m), or,
    without a group, the `ratio` of all weights in a block of 128 columns."""

    ratio: float
    zeros: int = 0
    group: int = 0

    def survivors(self, rows: int, columns: int) -> int:
        """How many weights of a matrix stay."""
        widths = [min(BLOCK, columns - start) for start in range(0, columns, BLOCK)]
        if self.group:
            return rows * columns // self.group * (self.group - self.zeros)
        return sum(rows * width - int(rows * width * self.ratio) for width in widths)

    def check(self, columns: int, name: str) -> None:
        """Refuse a matrix whose inputs are not whole groups."""
        if self.group and columns % self.group:
            refuse(
                "prune.pattern",
                f"{self.zeros}:{self.group}, which does not divide the {columns} inputs of {name}",
                f"a pattern whose second number divides {columns}",
            )


class Hessian:
    """X X^T over all calibration tokens of one input, float32, (inputs, inputs).

    The constant factor of the reference's 2 / n changes neither mask nor update.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.matrix = torch.zeros(inputs, inputs, device=device)

    def add(self, x: Tensor) -> None:
        """Take account of activations (..., inputs)."""
        x = x.detach().flatten(0, -2).float()
        self.matrix.addmm_(x.T, x)


def factor(hessian: Tensor) -> tuple[Tensor, Tensor, float]:
    """The upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U.

    It is the inverse of the upper R with H = R R^T, which is the lower Cholesky factor of H with
    rows and columns in reverse order, put back into order. The inverse itself is never made: never
    more than two matrices of the Hessian's size live, and only one thing can fail.

    Args:
        hessian: float32 (inputs, inputs); overwritten.

    Returns: the factor (inputs, inputs); which inputs never were non-zero; the damping used, as a
        share of the mean diagonal: 0.01, or ten times as much as often as it takes to make the
        Hessian positive definite.

    Raises:
        ValueError: NaN or Inf in it.
    """
    diagonal = hessian.diagonal()
    if not diagonal.isfinite().all():
        raise ValueError("NaN or Inf in the second moments of the inputs")
    dead = diagonal == 0
    diagonal[dead] = 1
    damping, step = 0.0, float(diagonal.mean())
    _reverse_(hessian)
    while True:
        wanted = 10 * damping or DAMPING
        diagonal += (wanted - damping) * step
        damping = wanted
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            break
    # The memory of the Hessian takes the inverse, transposed: LAPACK works by columns.
    inverse = hessian.zero_().mT
    inverse.diagonal().fill_(1)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    _reverse_(hessian)
    return inverse, dead, damping


def _reverse_(matrix: Tensor) -> None:
    """Rows and columns in reverse order, in place, a block of rows at a time."""
    size = len(matrix)
    for start in range(0, size // 2, BLOCK):
        stop = min(start + BLOCK, size // 2)
        top, bottom = matrix[start:stop], matrix[size - stop : size - start]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)


def sparsify_(weight: Tensor, upper: Tensor, dead: Tensor, pattern: Pattern) -> Tensor:
    """Prune a matrix in place, column by column; the error of each goes to the columns after it.

    Args:
        weight: float32 (out, in).
        upper, dead: from `factor`.

    Returns: the mask, bool (out, in), True where a weight survived; others are exact zeros.
    """
    mask = torch.ones_like(weight, dtype=torch.bool)
    weight[:, dead] = 0
    block = BLOCK - BLOCK % (pattern.group or 1)
    for start in range(0, weight.shape[1], block):
        columns = slice(start, min(start + block, weight.shape[1]))
        # Columns as rows: what the loop touches then lies side by side in memory.
        w, keep = weight[:, columns].T.contiguous(), mask[:, columns].T.contiguous()
        u = upper[columns, columns].contiguous()
        scale = u.diagonal().square().unsqueeze(1)
        if not pattern.group:
            removed = int(w.numel() * pattern.ratio)
            lowest = (w.square() / scale).flatten().topk(removed, largest=False, sorted=False)
            keep.view(-1)[lowest.indices] = False
        errors = torch.empty_like(w)
        for i in range(len(w)):
            if pattern.group and i % pattern.group == 0:
                near = slice(i, i + pattern.group)
                lowest = (w[near].square() / scale[near]).topk(pattern.zeros, 0, largest=False)
                keep[near].scatter_(0, lowest.indices, False)
            torch.mul(w[i], ~keep[i], out=errors[i])
            errors[i] /= u[i, i]
            w[i:].addr_(u[i, i:], errors[i], alpha=-1)
        weight[:, columns] = w.mul_(keep).T
        mask[:, columns] = keep.T
        weight[:, columns.stop :].addmm_(errors.T, upper[columns, columns.stop :], alpha=-1)
    return mask
