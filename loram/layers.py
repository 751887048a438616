"""A model of which one decoder layer is in memory at a time, and activations that wait on disk, or
off the device in memory."""

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loram.loss import Batch, next_token_loss
from loram.model import check_dense, read_config
from loram.pruned import meta_model
from loram.shards import Checkpoint, delete, finite

# Of residual stream in memory at a time: so much that reading the weights anew for the next takes
# less than computing with them.
HELD = 2 << 30


class Layers:
    """The decoder of a checkpoint, layer by layer, in float32.

    The layers are transformers' own classes, and their arguments (rotary embeddings, the mask that
    keeps packed documents apart, a sliding window) are what transformers' own forward pass hands
    to them, so nothing of a model family is written down here.

    Args:
        source: directory or hub id of a full or pruned model, not quantised.
        adapt: called with every layer that is loaded and its number, to put an adapter on it.

    Raises:
        UserError: a quantised or compressed model.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        device: str = "cpu",
        adapt: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self.config = read_config(source)
        check_dense(self.config, source)
        self.checkpoint = Checkpoint(source)
        self.device = torch.device(device)
        self._adapt = adapt
        model = meta_model(self.config)
        self._layers, self._embed, self._norm = (
            model.model.layers,
            model.model.embed_tokens,
            model.model.norm,
        )
        self._head = model.get_output_embeddings()
        self._trunk = model.model
        self._trunk.layers = nn.ModuleList(_Ask() for _ in self._layers)
        self._trunk.norm = nn.Identity()
        with self.device:  # its frequencies are computed, not loaded
            self._trunk.rotary_emb = type(self._trunk.rotary_emb)(config=self.config)

    def __len__(self) -> int:
        return len(self._layers)

    def layer(self, i: int) -> nn.Module:
        """Layer `i` with its weights; what is dropped by the caller leaves memory.

        Raises:
            ValueError: NaN or Inf in a weight (named).
        """
        layer = self._filled(self._layers[i], f"model.layers.{i}").eval()
        if self._adapt:
            self._adapt(layer, i)
        return layer

    def embedded(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """The inputs of layer 0, (batch, seq_len, hidden), for each batch."""
        embed = self._filled(self._embed, "model.embed_tokens")
        for batch in batches:
            yield embed(batch["input_ids"].to(self.device))

    def arguments(self, i: int, hidden: Tensor, batch: Batch) -> dict[str, Any]:
        """What layer `i` is called with, beside its input `hidden`."""
        positions = batch["position_ids"].to(self.device)
        self._trunk(inputs_embeds=hidden, position_ids=positions, use_cache=False)
        asked, self._trunk.layers[i].given = self._trunk.layers[i].given, {}
        return asked

    def head(self) -> tuple[nn.Module, nn.Module]:
        """The final norm and the output head."""
        tied = "lm_head.weight" not in self.checkpoint.names()
        name = "model.embed_tokens" if tied else "lm_head"
        return self._filled(self._norm, "model.norm"), self._filled(self._head, name)

    def _filled(self, module: nn.Module, name: str) -> nn.Module:
        # A copy also of what is in float32: written to, pages of the mapped file would stay.
        weights = {
            full.removeprefix(f"{name}."): finite(self.checkpoint.read(full), full).to(
                self.device, torch.float32, copy=True
            )
            for full in self.checkpoint.names(name)
        }
        filled = copy.deepcopy(module)
        filled.load_state_dict(weights, assign=True)
        return filled.requires_grad_(False)


class _Ask(nn.Module):
    """Stands where a layer was and remembers what it was called with."""

    given: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        self.given = given
        return hidden


class Spool:
    """Tensors that wait on disk under a name, one for each batch; a name is there whole or not."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def write(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Write one tensor a batch; after a crash half-way nothing of it counts."""
        self.write_several(name, ({"x": tensor} for tensor in tensors))

    def write_several(self, name: str, batches: Iterable[Batch]) -> None:
        """Write several named tensors a batch."""
        partial = self.directory / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for number, batch in enumerate(batches):
            tensors = {key: tensor.contiguous().cpu() for key, tensor in batch.items()}
            save_file(tensors, partial / f"{number:06d}.safetensors")
        self.drop(name)
        partial.rename(self.directory / name)

    def read(self, name: str, number: int) -> Tensor:
        """What `write` wrote of a batch."""
        return self.read_several(name, number)["x"]

    def read_all(self, name: str) -> Iterator[Tensor]:
        """What `write` wrote, batch by batch."""
        for number in range(len(list((self.directory / name).iterdir()))):
            yield self.read(name, number)

    def read_several(self, name: str, number: int) -> Batch:
        return load_file(self.directory / name / f"{number:06d}.safetensors")

    def names(self) -> set[str]:
        return {path.name for path in self.directory.glob("*") if path.suffix != ".partial"}

    def drop(self, name: str) -> None:
        """Delete it, if it is there."""
        delete(self.directory / name)

    def clear(self) -> None:
        """Delete everything."""
        delete(self.directory)


def in_parts(batches: Sequence[Batch], hidden_size: int) -> Iterator[range]:
    """Numbers of the batches, all of one size but the last, that `walk` is to take together: as
    many as have `HELD` bytes of residual stream, in float32, at least one."""
    count = max(1, HELD // (4 * hidden_size * batches[0]["input_ids"].numel()))
    for first in range(0, len(batches), count):
        yield range(first, min(first + count, len(batches)))


def walk(layers: Layers, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Tensor]]]:
    """Take batches through the layers together: yields i and, a float32 tensor a batch, off the
    device, what goes into layer i; at the end what came out of the last. The list is always the
    same one.

    Raises:
        ValueError: NaN or Inf; names the layer.
    """
    stream = [hidden.cpu() for hidden in layers.embedded(batches)]
    yield 0, stream
    for i in range(len(layers)):
        for n, hidden in enumerate(forward(layers, i, layers.layer(i), batches, stream)):
            stream[n] = hidden.cpu()
        yield i + 1, stream


def forward(
    layers: Layers, i: int, layer: nn.Module, batches: Iterable[Batch], inputs: Iterable[Tensor]
) -> Iterator[Tensor]:
    """The outputs of layer `i`, batch by batch.

    Raises:
        ValueError: NaN or Inf; names the layer.
    """
    for hidden, batch in zip(inputs, batches, strict=True):
        hidden = hidden.to(layers.device)
        output = layer(hidden, **layers.arguments(i, hidden, batch))
        if not output.isfinite().all():
            raise ValueError(f"NaN or Inf in the weights or activations of model.layers.{i}")
        yield output


@torch.no_grad()
def keep_inputs(layers: Layers, batches: list[Batch], spool: Spool) -> None:
    """Put `input-<i>` of every layer into the spool, and as the last what comes out of the top one;
    after a crash only those that are not there.

    Raises:
        ValueError: NaN or Inf; names the layer.
    """
    if "input-0" not in spool.names():
        spool.write("input-0", layers.embedded(batches))
    for i in range(len(layers)):
        if f"input-{i + 1}" not in spool.names():
            inputs = spool.read_all(f"input-{i}")
            spool.write(f"input-{i + 1}", forward(layers, i, layers.layer(i), batches, inputs))


def loss_gradients(layers: Layers, batches: list[Batch], spool: Spool) -> Iterator[Tensor]:
    """The gradient of the summed loss at what `keep_inputs` put in last, batch by batch.

    Raises:
        ValueError: the loss is not finite.
    """
    norm, head = layers.head()
    for number, batch in enumerate(batches):
        hidden = spool.read(f"input-{len(layers)}", number).to(layers.device).requires_grad_(True)
        with torch.enable_grad():
            loss = next_token_loss(head, norm(hidden), batch["labels"].to(layers.device))
        if not loss.isfinite():
            raise ValueError("the calibration loss is not finite: NaN or Inf in norm or lm_head")
        yield torch.autograd.grad(loss, hidden)[0]
