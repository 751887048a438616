"""A large model, a small one and the offsets between them."""

import torch

from loram.adapter import AdapterConfig
from loram.by_row import from_float8
from loram.model import save
from loram.offsets import Offsets, write_offsets
from loram.prune import PruneConfig, choose, prune
from loram.taylor import random_scores
from tests.conftest import tiny_model
from tests.test_distil import numbered

ADAPTER = AdapterConfig(r=4, dropout=0.0)


def small_and_large(family, tmp_path, ratio=0.5):
    """Directories of a full model and of it cut at random."""
    full = tiny_model(family)
    save(full, tmp_path / "base")
    config = PruneConfig("rand", ratio, keep_first=1, keep_last=1, seed=3)
    kept = choose(random_scores(full.config, 3), full.config, config)
    prune(tmp_path / "base", tmp_path / "small", kept)
    return tmp_path / "base", tmp_path / "small"


def written(tmp_path, base, small, every, given=None, **options):
    out = tmp_path / f"offsets-{every}"
    out.mkdir()
    found = write_offsets(
        base, small, out, given or numbered(), every, work=tmp_path / "w", **options
    )
    return Offsets(out), found


def state(module, batch) -> torch.Tensor:
    """What the output head sees, which decides the answer."""
    given, seen = {name: tensor for name, tensor in batch.items() if name != "row"}, []
    norm = next(m for name, m in module.named_modules() if name.endswith("model.norm"))
    hook = norm.register_forward_hook(lambda norm, args, output: seen.append(output.float()))
    with torch.no_grad():
        module(**given)
    hook.remove()
    return seen[0]


def values(offsets, rows) -> torch.Tensor:
    found = offsets.fetch(rows)
    return from_float8({name: found[f"offset_{name}"] for name in ("values", "scale")})


def distance(a, b) -> float:
    return float((a - b).norm())
