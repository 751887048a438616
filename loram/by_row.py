"""Tensors that belong to packed rows, on disk: written batch by batch, read row by row."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from loram.loss import Batch
from loram.shards import delete, link, rewrite, save_whole

INFO = "rows.json"
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def write_rows(directory: Path, number: int, tensors: Batch) -> None:
    """Write what belongs to a batch's rows; there whole, or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_whole(kept, _file(directory, number))


def has_rows(directory: Path, numbers: Iterable[int]) -> bool:
    """Whether `write_rows` wrote of all these batches."""
    return all(_file(directory, number).exists() for number in numbers)


def publish(done: Path, out: Path, batches: Sequence[Batch], layers: list[int]) -> dict[str, float]:
    """Turn what was written in `done` of all batches, of one size but the last, into `out`, for
    `ByRow`; `done` is no more then.

    Args:
        layers: those that it is about.

    Returns: bytes; tokens.
    """
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    info = {"rows": rows, "size": len(batches[0]["row"]), "layers": layers}
    rewrite(done / INFO, json.dumps(info))
    shutil.copytree(done, out, dirs_exist_ok=True, copy_function=link)
    delete(done)
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    return {"bytes": written, "tokens": sum(batch["input_ids"].numel() for batch in batches)}


class ByRow:
    """The tensors that `write_rows` wrote for batches, whose first dimension are rows, by row.

    layers: those that `publish` was told.

    Raises:
        FileNotFoundError: nothing finished is there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        info = json.loads((self.directory / INFO).read_text())
        self._place = {row: n for n, row in enumerate(info["rows"])}
        self._size, self.layers = info["size"], info["layers"]

    def read(self, name: str, rows: Tensor) -> Batch:
        """What is under a name of these rows (b), each tensor (b, ...); nothing else is read.

        Raises:
            KeyError: a row that is not there.
        """
        parts: dict[str, list[Tensor]] = {}
        for row in rows.tolist():
            number, at = divmod(self._place[row], self._size)
            with safe_open(_file(self.directory / name, number), "pt") as file:
                for key in file.keys():
                    parts.setdefault(key, []).append(file.get_slice(key)[at : at + 1])
        return {key: torch.cat(found) for key, found in parts.items()}


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.safetensors"


def to_float8(x: Tensor) -> Batch:
    """Of x (..., n): `values`, float8 (e4m3) (..., n), and `scale`, float32 (..., 1). Some channels
    of a residual stream are hundreds of times larger than others, which integers of one byte would
    lose."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return {"values": (x.float() / scale).to(torch.float8_e4m3fn), "scale": scale}


def from_float8(kept: Batch) -> Tensor:
    """The float32 tensor that `to_float8` kept, to 3 bits after the leading one."""
    return kept["values"].float() * kept["scale"]
