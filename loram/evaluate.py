"""How good a model is: perplexity on packed rows, text that it writes, answers that are right."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loram.data import CHAT_OPTIONS, IGNORED, pad_id
from loram.loss import Batch, CausalLoss, to_device
from loram.packing import Packed
from loram.parallel import world

FINAL = re.compile(r"#### (-?[\d.,]*\d)")  # GSM8K ends its solutions so
GREEDY = {  # whatever the model's generation_config.json says
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@torch.no_grad()
def perplexity(
    model: nn.Module, batches: Iterable[Batch], *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Loss over all trained positions of packed rows.

    Args:
        model: a causal LM, a `PeftModel`, or a module of `loram.parallel`; then every process
            calls this with its share of the rows, as many batches each.
        batches: as for `loram.train.train`.
        dtype: of the computation (autocast); float32 computes in the model's own dtype.

    Returns:
        loss: nats per trained token; perplexity: its exponential; tokens: how many were trained.

    Raises:
        ValueError: no position has a label.
        FloatingPointError: the loss is not finite.
    """
    module = CausalLoss(model) if hasattr(model, "get_output_embeddings") else model
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            totals[0] += module(**to_device(batch, device))
        totals[1] += int((batch["labels"][:, 1:] != IGNORED).sum())
    module.train(was_training)
    if world()[1] > 1:
        dist.all_reduce(totals)
    loss_sum, tokens = totals.tolist()
    if tokens == 0:
        raise ValueError("no position of the batches has a label")
    loss = loss_sum / tokens
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of {int(tokens)} held-out tokens is {loss}")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
) -> str:
    """The model's continuation of a text, or its answer to messages through the chat template;
    greedy.

    Args:
        prompt: plain text, or messages `{"role": ..., "content": ...}`.

    Returns:
        The new text alone, without special tokens.
    """
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **CHAT_OPTIONS,
        )
    inputs = inputs.to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=pad_id(tokenizer, model.config.vocab_size),
        **GREEDY,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@dataclass(frozen=True)
class Problem:
    """A held-out conversation up to its first answer, and that answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def problems(packed: Packed) -> Iterator[Problem]:
    """The conversations of packed rows, in their order; padding is none of them."""
    for row in range(packed.rows):
        arrays = packed.fetch([row])
        ids, labels, places = (arrays[n][0] for n in ("input_ids", "labels", "position_ids"))
        starts = np.flatnonzero(places == 0)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            trained = labels[start:end] != IGNORED
            if not trained.any():
                continue
            first = int(trained.argmax())
            length = int(np.append(~trained[first:], True).argmax())
            document = ids[start:end].tolist()
            yield Problem(document[:first], document[first : first + length])


@torch.no_grad()
def strict_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Problem],
    *,
    size: int = 8,
    max_new_tokens: int = 256,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """How many problems the model answers with the reference's final number.

    Greedy answers to the conversation as it was trained, with no examples before it; only a number
    that is marked as GSM8K marks it counts (its strict match).

    Args:
        size: problems answered at a time, padded on the left.
        dtype: as in `perplexity`.

    Returns:
        strict_match: share of right answers, in [0, 1]; answered: of how many problems, those whose
        reference has a final number. Empty if none has.
    """
    scored = [(p, final_number(tokenizer.decode(p.answer))) for p in asked]
    scored = [(problem, number) for problem, number in scored if number is not None]
    pad, device = pad_id(tokenizer, model.config.vocab_size), model.device
    stops, right = stop_tokens(model, tokenizer), 0
    for start in range(0, len(scored), size):
        chunk = scored[start : start + size]
        longest = max(len(problem.prompt) for problem, _ in chunk)
        free = [longest - len(problem.prompt) for problem, _ in chunk]
        ids = [[pad] * n + problem.prompt for n, (problem, _) in zip(free, chunk, strict=True)]
        seen = [[0] * n + [1] * (longest - n) for n in free]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(seen, device=device),
                max_new_tokens=max_new_tokens,
                eos_token_id=stops,
                pad_token_id=pad,
                **GREEDY,
            )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        right += sum(
            final_number(text) == number for text, (_, number) in zip(texts, chunk, strict=True)
        )
    return {"strict_match": right / len(scored), "answered": len(scored)} if scored else {}


def final_number(answer: str) -> str | None:
    """The first number that follows `####`, without thousands separators; None if none does."""
    found = FINAL.search(answer)
    return found[1].replace(",", "") if found else None


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the model's own, the tokenizer's EOS, and what the chat template
    writes after an answer, which in some models (Llama 3, Qwen) is neither."""
    stops = model.generation_config.eos_token_id
    ids = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ANSWER"}]
        ending = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        after = tokenizer(ending.strip(), add_special_tokens=False)["input_ids"]
        ids |= {i for i in after[:1] if i in tokenizer.added_tokens_decoder}
    return sorted(i for i in ids if i is not None)
