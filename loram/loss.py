"""Next-token loss that never holds the logits of a whole batch, which can outweigh the model."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK = 1024  # positions whose logits exist at one time

Batch = dict[str, Tensor]


def not_padding(batch: Batch) -> Tensor:
    """Bool (batch, seq_len): up to the last label of each row."""
    return (batch["labels"] != -100).flip(1).int().cummax(1).values.flip(1).bool()


def trained_tokens(batches: Iterable[Batch]) -> int:
    """How many tokens of calibration rows have a loss.

    Raises:
        ValueError: none.
    """
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    if not tokens:
        raise ValueError("the calibration rows hold no token to predict")
    return tokens


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model under an adapter, if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class CausalLoss(nn.Module):
    """A causal language model as a module from a batch to its summed loss, ready for DDP or FSDP2.

    The sum, not the mean: what to divide by is known only when the global batch is complete.
    `forward` maps `input_ids`, `labels`, `position_ids`, each int64 `[b, T]`, to the sum of
    cross-entropies in nats, an fp32 scalar. Labels are as Hugging Face has them: at the position of
    their token, -100 where nothing is trained. Position ids that restart at 0 keep documents apart.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        base = unwrapped(self.model)
        # Without an attention mask and without a cache (and only then) transformers derives the
        # block-diagonal mask from restarting positions.
        out = base.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return next_token_loss(base.get_output_embeddings(), out.last_hidden_state, labels)


def next_token_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of an output head on the final hidden states, `[b, T, hidden]`."""
    targets = labels[:, 1:]
    trained = targets != -100
    return summed_loss(head, hidden[:, :-1][trained], targets[trained])


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same on the states `[n, hidden]` that are to predict the tokens `targets` `[n]`."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        parts = [
            checkpoint(_cross_entropy, head, h, t, use_reentrant=False)
            for h, t in _chunks(hidden, targets)
        ]
        return torch.stack(parts).sum()
    return _FrozenHead.apply(head, hidden, targets)


class _FrozenHead(torch.autograd.Function):
    """Loss of a head that is not trained: its gradient is taken chunk by chunk in the forward pass.

    Against recomputing the logits in backward this saves a third of the head's work, which for
    a small model with a large vocabulary is a sixth of a training step.
    """

    @staticmethod
    def forward(ctx: Any, head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        need = ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = []
        for h, t in _chunks(hidden, targets):
            with torch.set_grad_enabled(need):
                h = h.detach().requires_grad_(need)
                loss = _cross_entropy(head, h, t)
            total += loss.detach()
            if need:
                grads += torch.autograd.grad(loss, h)
        if need:
            ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (hidden_grad,) = ctx.saved_tensors
        return None, hidden_grad * grad.to(hidden_grad.dtype), None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """What a loss takes of a batch: all but the numbers of its rows."""
    return {
        name: tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
        if name != "row"
    }


def _cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _chunks(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
