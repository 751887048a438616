"""Small packed data: several documents a row, prompts without labels, some padding."""

from pathlib import Path

import numpy as np
import torch

from loram.data import Document
from loram.packing import Packed, best_fit, write_packed


def packed_rows(path: Path, documents: int = 150, seq_len: int = 64, vocab: int = 128) -> Packed:
    """About `documents` / 2.5 rows of random tokens, equal in every call."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 40, documents)
    made = [
        Document(random.integers(3, vocab, n).astype(np.int32), np.arange(n) > 3) for n in lengths
    ]
    write_packed(path, best_fit(made, seq_len), seq_len=seq_len, pad_id=0)
    return Packed(path)


class TrainerRows(torch.utils.data.Dataset):
    """Rows as the HF Trainer wants them: one dict of tensors a row."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 32)
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32)}
