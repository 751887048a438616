"""What would live in memory, counted without any: models, layers and batches on tensors that have
no storage."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from loram.compressed import CompressedLinear, spread, tables
from loram.pruned import meta_model


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made in its scope, as long as they live, and their peak."""

    def __init__(self, known: list[nn.Module]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()
        for module in known:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._seen[tensor.untyped_storage()] = True
                if tensor.grad is not None:
                    self._seen[tensor.grad.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def counting(model: nn.Module, *, mixed: bool = True) -> Iterator[Live]:
    """Count what is made in this scope, beside the model and without storage, as on a device that
    casts to bfloat16 (autocast) or does not."""
    tables(torch.device("cpu"))  # made before, so that real ones are remembered
    cast = torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True), cast:
        model.to_empty(device="cpu")
        with Live([model]) as live:
            yield live


def layers_of_each_shape(
    config: PreTrainedConfig, nf4: bool = False
) -> tuple[PreTrainedModel, list[int]]:
    """The model in bf16 without storage, its linears quantised or not, of equal layers the last
    alone; how many there were."""
    model = meta_model(config).bfloat16()
    shapes = [
        tuple(weight.shape for weight in layer.state_dict().values())
        for layer in model.model.layers
    ]
    last = {shape: i for i, shape in enumerate(shapes)}
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in sorted(last.values()))
    if nf4:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, _Dequantised(module))
    return model, [Counter(shapes)[shapes[i]] for i in sorted(last.values())]


def inputs(model: PreTrainedModel, rows: int, seq_len: int) -> tuple[Tensor, dict[str, Any]]:
    """A batch, embedded, and what layers are called with; rows hold several documents."""
    ids, _, positions = (torch.empty(rows, seq_len, dtype=torch.int64) for _ in range(3))
    hidden = model.get_input_embeddings()(ids).detach().requires_grad_(torch.is_grad_enabled())
    given = {
        "attention_mask": torch.empty(rows, 1, seq_len, seq_len, dtype=torch.bool),
        "position_embeddings": model.model.rotary_emb(hidden, position_ids=positions),
        "position_ids": positions,
    }
    return hidden, given


def weight_count(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in layer.parameters())


class _Dequantised(CompressedLinear):
    """Stands for a linear in NF4, dense or compressed: its bf16 values exist while used."""

    def __init__(self, linear: nn.Linear) -> None:
        survivors = linear.count if isinstance(linear, CompressedLinear) else 0
        shape = linear.in_features, linear.out_features, linear.bias is not None
        super().__init__(*shape, survivors, nf4=False)
        self.to("meta")

    @property
    def weight(self) -> Tensor:
        values = self.count or self.out_features * self.in_features
        made = torch.empty(values, dtype=torch.bfloat16, device=self.bits.device)
        if self.count:
            return spread(made, self.bits, self.in_features)
        return made.view(self.out_features, self.in_features)
