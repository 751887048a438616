"""Stand-ins by what sub-blocks do to gradients, from the last layer to the first: for training with
offsets after every layer.

Offsets put the small model where the large one is after every layer, whatever its stand-ins make of
x: what those are still for is the way back. Let G be the large model's gradient of the loss at the
output of a sub-block and g the small one's, both models at the large one's stream (between a
layer's attention and its MLP that is an approximation); J and J_kept the Jacobians of the whole
sub-block and of the cut one. C is the ridge regression of what is missing backward, g C^T for
J^T G - J_kept^T g, and, with little weight, forward, x C for f(x) - f_kept(x), which keeps it tame
where no gradient went (`ridge.solve_both`). It makes up for what was removed here and for what the
gradient still misses from behind. `python -m tests.benchmarks.gradients` measures how near the
small model's gradients then are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from loram.layers import Spool, keep_inputs, loss_gradients
from loram.loss import Batch, not_padding
from loram.ridge import Moments, solve_both
from loram.stand_in import StandInFound
from loram.subblocks import SubBlocks


def fit_gradients(
    full: SubBlocks,
    small: SubBlocks,
    batches: list[Batch],
    spool: Spool,
    blocks: list[str],
    *,
    rank: int,
    damping: float,
) -> Iterator[StandInFound]:
    """The large model forward, then both gradients backward through all sub-blocks; yields the
    stand-ins of `blocks`, the last sub-block's first. The norms are the large model's: pruning
    leaves them alone.

    After a crash it goes on at the layer or sub-block that it had reached. On disk the inputs of
    all layers of the large model and at most seven times the residual stream, in float32.
    """
    keep_inputs(full.layers, batches, spool)
    sweep = _Sweep(full, small, batches, spool)
    for number in reversed(range(sweep.start())):
        sweep.prepare(number)
        fit = _Both(full) if full.name(number) in blocks else None
        spool.write_several("vjp", sweep.vjp(number, fit))
        pair: tuple[Tensor, Tensor] | None = None
        if fit:
            found = solve_both(fit.forward, fit.backward, fit.scale, rank, damping)
            p, q = pair = found[0].to(small.dtype(number)), found[1].to(small.dtype(number))
            yield StandInFound(full.name(number), p, q, fit.backward.share_left(q.T, p.T))
        spool.write_several(f"gradient-{number}", sweep.before(number, pair))
        spool.drop(f"gradient-{number + 1}")


class _Both:
    """What is missing forward and backward, and the squared output of the whole sub-block."""

    def __init__(self, full: SubBlocks) -> None:
        hidden = full.layers.config.hidden_size
        self.forward, self.backward = Moments(hidden, full.device), Moments(hidden, full.device)
        self.scale = 0.0


class _Sweep:
    """`gradient-<n>` in the spool are both gradients at the input of sub-block number n, `vjp`
    those at its norm(h), `middle-<i>` the large stream between attention and MLP of layer i."""

    def __init__(
        self, full: SubBlocks, small: SubBlocks, batches: list[Batch], spool: Spool
    ) -> None:
        self.full, self.small, self.batches, self.spool = full, small, batches, spool

    def start(self) -> int:
        """The sub-block behind which to begin or to go on, with its gradients in the spool."""
        names = [name for name in self.spool.names() if name.startswith("gradient-")]
        if not names:
            top = loss_gradients(self.full.layers, self.batches, self.spool)
            ends = ({"large": gradient, "small": gradient.clone()} for gradient in top)
            self.spool.write_several(f"gradient-{len(self.full)}", ends)
            return len(self.full)
        reached, *done = sorted(int(name.removeprefix("gradient-")) for name in names)
        for number in done:
            self.spool.drop(f"gradient-{number}")
        return reached

    def prepare(self, number: int) -> None:
        """Have the stream that goes into it."""
        i = number // 2
        if number % 2 and f"middle-{i}" not in self.spool.names():
            streams = (
                self.full.after(2 * i, self._stream(2 * i, n), batch)
                for n, batch in enumerate(self.batches)
            )
            self.spool.write(f"middle-{i}", streams)
        if not number % 2:
            self.spool.drop(f"middle-{i}")

    def vjp(self, number: int, fit: _Both | None) -> Iterator[Batch]:
        """Both gradients at norm(h), the small one's without a stand-in; tells `fit` what is
        missing."""
        for n, batch in enumerate(self.batches):
            x = self.full.input(number, self._stream(number, n))
            behind = self._both(f"gradient-{number + 1}", n)
            output, large = self.full.vjp(number, x, batch, behind["large"])
            kept, small = self.small.vjp(number, x, batch, behind["small"])
            if fit:
                real = not_padding(batch).to(x.device)
                fit.forward.add(x[real], (output - kept)[real])
                fit.backward.add(behind["small"][real], (large - small)[real])
                fit.scale += float(output[real].float().square().sum())
            yield {"large": large, "small": small}

    def before(self, number: int, pair: tuple[Tensor, Tensor] | None) -> Iterator[Batch]:
        """Both gradients at its input, the small one's with the stand-in."""
        for n in range(len(self.batches)):
            behind, at_norm = self._both(f"gradient-{number + 1}", n), self._both("vjp", n)
            if pair:
                p, q = (x.to(behind["small"]) for x in pair)
                at_norm["small"] = at_norm["small"] + behind["small"] @ q.T @ p.T
            with torch.enable_grad():
                hidden = self._stream(number, n).requires_grad_(True)
                x = self.full.input(number, hidden)
            yield {
                name: gradient
                + torch.autograd.grad(x, hidden, at_norm[name].to(x), retain_graph=True)[0]
                for name, gradient in behind.items()
            }

    def _stream(self, number: int, n: int) -> Tensor:
        name = f"middle-{number // 2}" if number % 2 else f"input-{number // 2}"
        return self.spool.read(name, n).to(self.full.device)

    def _both(self, name: str, n: int) -> Batch:
        found = self.spool.read_several(name, n)
        return {which: gradient.to(self.full.device) for which, gradient in found.items()}
