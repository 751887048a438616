"""LoRAM: train a LoRA adapter on a small, pruned copy of a model, use it on the original.

A notebook needs, in this order: `loram.prune` (score, choose, prune), `loram.adapter` (attach,
recover, merge), `loram.data` and `loram.packing` (rows), `loram.train`, `loram.evaluate`.
"""

from loram.model import load, load_tokenizer, register, save

__all__ = ["load", "load_tokenizer", "register", "save"]
