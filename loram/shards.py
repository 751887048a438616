"""A checkpoint tensor by tensor, in and out: no more of it in memory than is being worked on."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from loram.hub import local
from loram.model import INDEX, weight_files

# What goes along unchanged when a model directory is written anew: its text side, what was kept.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
    "kept.safetensors",
)


class Checkpoint:
    """The safetensors of a model directory (or hub id), read by name.

    Files are memory-mapped: what is read and dropped again is never part of a process's own memory.

    Raises:
        UserError: a file is missing.
    """

    def __init__(self, source: str | Path) -> None:
        self.path = local(source)
        self._files = {}
        for file in weight_files(self.path):
            opened = safe_open(file, framework="pt")
            # LLaMA-2's checkpoints also hold rotary frequencies, which every loader computes.
            names = [n for n in opened.keys() if not n.endswith(".rotary_emb.inv_freq")]
            self._files.update(dict.fromkeys(names, opened))

    def names(self, part: str = "") -> list[str]:
        """Names of all tensors, or of those of a part such as `model.layers.3`."""
        return [name for name in self._files if not part or name.startswith(f"{part}.")]

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype."""
        return self._files[name].get_tensor(name)

    def tensors(self, part: str) -> dict[str, Tensor]:
        """All tensors of one of `parts`, by name."""
        return {name: self.read(name) for name in self.names(part) or [part]}

    def parts(self) -> list[str]:
        """What to read together: each decoder layer, and every tensor outside of them."""
        found: dict[str, None] = {}
        for name in self._files:
            pieces = name.split(".")
            found[".".join(pieces[:3]) if pieces[1] == "layers" else name] = None
        return list(found)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself, if all of it is finite.

    Raises:
        ValueError: NaN or Inf in it.
    """
    low, high = tensor.aminmax()  # no copy of the tensor is made, as `isfinite` does
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"NaN or Inf in {name}")
    return tensor


def write_part(out: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of one part to a file of their own; there whole, or not at all."""
    save_whole(tensors, part_file(out, part))


def save_whole(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file; there whole, or not at all."""
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.rename(file)


def part_file(out: Path, part: str) -> Path:
    """Where `write_part` puts a part: `model-layers-00003.safetensors`, `model-norm...`."""
    pieces = part.removeprefix("model.").removesuffix(".weight").split(".")
    pieces = [f"{int(piece):05d}" if piece.isdigit() else piece for piece in pieces]
    return Path(out) / f"model-{'-'.join(pieces)}.safetensors"


def rewrite(file: Path, text: str) -> None:
    """Replace a small file; a crash or a full disk leaves the old one."""
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def note(file: Path, more: Mapping[str, float]) -> None:
    """Add to a small JSON object; a crash or a full disk leaves the old one."""
    rewrite(file, json.dumps(noted(file) | dict(more)))


def noted(file: Path) -> dict[str, float]:
    """What `note` wrote, if anything."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def link(source: str | Path, target: str | Path) -> None:
    """Make a finished file be at `target` too: by a hard link, or where there are none a copy."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def delete(directory: Path) -> None:
    """Remove it, if it is there; a crash half-way leaves nothing that looks whole."""
    going = directory.with_name(f"{directory.name}.going.partial")
    shutil.rmtree(going, ignore_errors=True)
    if directory.exists():
        directory.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def write_index(out: Path) -> None:
    """Write the index that makes the parts in `out` one checkpoint for every loader."""
    names, total = {}, 0
    for file in sorted(Path(out).glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                names[name] = file.name
                total += opened.get_tensor(name).nbytes  # mapped, not read
    listing = {"metadata": {"total_size": total}, "weight_map": names}
    (Path(out) / INDEX).write_text(json.dumps(listing, indent=1, sort_keys=True))


def write_rest(out: Path, config: PreTrainedConfig, source: Path) -> None:
    """Make the parts in `out` a model directory: their index, the config, and what goes along."""
    write_index(out)
    config.save_pretrained(out)
    copy_companions(source, out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation config and kept indices to another directory."""
    for names in COMPANIONS:
        for file in Path(source).glob(names):
            shutil.copyfile(file, Path(out) / file.name)
