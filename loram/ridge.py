"""Ridge regression cut to a rank."""

import torch
from torch import Tensor


class Fit:
    """Second moments of x (tokens, hidden) and of what is missing (tokens, hidden), float32."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        self.gram = torch.zeros(hidden, hidden, device=device)
        self.cross = torch.zeros(hidden, hidden, device=device)
        self.square = 0.0

    def add(self, x: Tensor, missing: Tensor) -> None:
        """Take account of tokens."""
        x, missing = x.float(), missing.float()
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, missing)
        self.square += float(missing.square().sum())

    def solve(self, rank: int, damping: float) -> tuple[Tensor, Tensor]:
        """P (hidden, rank) and Q (rank, hidden), float64: C = G^-1 X^T T cut to a rank.

        Nearest in the metric of the output, G = L L^T: by the right singular vectors V of L^T C,
        which are the eigenvectors of C^T G C = C^T X^T T; P = C V and Q = V^T.
        """
        gram, cross = self.gram.double(), self.cross.double()
        gram.diagonal().add_(damping * gram.diagonal().mean())
        c = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
        energy = c.T @ cross
        v = torch.linalg.eigh((energy + energy.T) / 2).eigenvectors[:, -rank:]
        return c @ v, v.T.contiguous()

    def left(self, p: Tensor, q: Tensor) -> float:
        """The share of what is missing that (x P) Q leaves."""
        c = p.double() @ q.double()
        filled = 2 * (c * self.cross).sum() - (c * (self.gram.double() @ c)).sum()
        return 1 - float(filled) / self.square if self.square else 0.0
