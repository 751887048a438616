"""LoRAM: train a LoRA adapter on a small, pruned copy of a model, use it on the original.

A notebook needs, in this order: `loram.data` and `loram.packing` (rows), `loram.prune` (score,
choose, prune), `loram.adapter` (attach), `loram.train`, `loram.adapter` (recover),
`loram.evaluate`, `loram.merge`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loram.data import load_tokenizer
    from loram.model import load, read_config, register, save

__all__ = ["load", "load_tokenizer", "read_config", "register", "save"]


def __getattr__(name: str) -> Any:
    # On demand: a process that only reads rows or sends metrics would load torch and more for it.
    if name in __all__:
        from loram import data, model

        return getattr(data if name == "load_tokenizer" else model, name)
    raise AttributeError(f"module 'loram' has no attribute {name!r}")
