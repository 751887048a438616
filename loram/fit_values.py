"""Stand-ins by what sub-blocks put into the residual stream, from the first layer to the last.

C is the ridge regression on x of what is missing, h + f(norm(h)) - g - f_kept(x), over the
calibration tokens; (x P) Q is the nearest to x C of rank k. It makes up for what was removed here
and for what is still missing from before; nothing is after a layer whose output training will put
right (`loram.offsets`).
"""

from collections.abc import Collection, Iterator

from torch import Tensor

from loram.layers import Spool
from loram.loss import Batch, not_padding
from loram.ridge import Moments
from loram.stand_in import StandInFound
from loram.subblocks import SubBlocks


def fit_values(
    full: SubBlocks,
    small: SubBlocks,
    batches: list[Batch],
    spool: Spool,
    blocks: list[str],
    *,
    rank: int,
    damping: float,
    offsets: Collection[int],
) -> Iterator[StandInFound]:
    """Both residual streams through all sub-blocks; yields the stand-ins of `blocks`.

    After a crash it goes on at the sub-block it had reached. On disk at most five times the
    residual stream in float32.
    """
    streams = _Streams(full, small, batches, spool)
    for number in range(streams.reached(), len(full)):
        spool.write(f"large-{number + 1}", streams.large(number))
        if full.name(number) in blocks:
            fit = Moments(full.layers.config.hidden_size, full.device)
            spool.write("kept", streams.kept(number, fit))
            # What follows sees them as they are kept.
            p, q = (x.to(small.dtype(number)) for x in fit.solve(rank, damping))
            yield StandInFound(full.name(number), p, q, fit.share_left(p, q))
            output = streams.compensated(number, p, q)
        else:
            output = streams.kept(number, None)
        if number % 2 and number // 2 + 1 in offsets:
            output = (streams.read(f"large-{number + 1}", n) for n in range(len(batches)))
        spool.write(f"small-{number + 1}", output)
        spool.drop(f"large-{number}")
        spool.drop(f"small-{number}")


class _Streams:
    """The residual streams of both models, `large-<n>` and `small-<n>` in the spool being what goes
    into sub-block number n."""

    def __init__(
        self, full: SubBlocks, small: SubBlocks, batches: list[Batch], spool: Spool
    ) -> None:
        self.full, self.small, self.batches, self.spool = full, small, batches, spool
        if not any(name.startswith("small-") for name in spool.names()):
            spool.write("large-0", full.layers.embedded(batches))
            spool.write("small-0", small.layers.embedded(batches))

    def reached(self) -> int:
        """The sub-block to go on with."""
        there = [name.removeprefix("small-") for name in self.spool.names()]
        found = max(int(number) for number in there if number.isdigit())
        for kind in ("large", "small"):
            self.spool.drop(f"{kind}-{found - 1}")  # which a crash can have left
        return found

    def read(self, name: str, n: int) -> Tensor:
        return self.spool.read(name, n).to(self.full.device)

    def large(self, number: int) -> Iterator[Tensor]:
        """The large stream after sub-block `number`."""
        for n, batch in enumerate(self.batches):
            yield self.full.after(number, self.read(f"large-{number}", n), batch)

    def kept(self, number: int, fit: Moments | None) -> Iterator[Tensor]:
        """The small stream after it without a stand-in; tells `fit` what is missing."""
        for n, batch in enumerate(self.batches):
            g = self.read(f"small-{number}", n)
            x = self.small.input(number, g)
            after = g + self.small.output(number, x, batch)
            if fit:
                real = not_padding(batch).to(g.device)
                missing = self.read(f"large-{number + 1}", n) - after
                fit.add(x[real], missing[real])
            yield after

    def compensated(self, number: int, p: Tensor, q: Tensor) -> Iterator[Tensor]:
        """The small stream after it with the stand-in, from that without."""
        for n in range(len(self.batches)):
            x = self.small.input(number, self.read(f"small-{number}", n))
            yield self.read("kept", n) + x @ p.to(x) @ q.to(x)
