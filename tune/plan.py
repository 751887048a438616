"""What a sweep is asked to do."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from tune.space import Space


@dataclass(frozen=True)
class Plan:
    """A sweep and how it is run.

    Attributes:
        recipe, plain: the words that name what does not vary.
        trials: in each group.
        metric: of the trials' final metrics, the one by which the best is chosen.
        seed: of the search.
        concurrent: trials at a time; None for as many as fit.
    """

    recipe: str
    plain: tuple[str, ...]
    space: Space
    trials: int
    metric: str
    seed: int
    concurrent: int | None

    @property
    def key(self) -> str:
        """Equal for the same sweep: what of it is done is not done again."""
        about = dataclasses.asdict(self.space) | {"trials": self.trials, "seed": self.seed}
        for name in ("place", "tracking", "experiment"):
            about["recipe"].pop(name)
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
