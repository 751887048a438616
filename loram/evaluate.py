"""How good a model is: perplexity on packed rows, and text that it writes."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loram.loss import Batch, CausalLoss, to_device
from loram.parallel import world


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
    """
    module = CausalLoss(model) if hasattr(model, "get_output_embeddings") else model
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            totals[0] += module(**to_device(batch, device))
        totals[1] += int((batch["labels"][:, 1:] != -100).sum())
    module.train(was_training)
    if world()[1] > 1:
        dist.all_reduce(totals)
    loss_sum, tokens = totals.tolist()
    if tokens == 0:
        raise ValueError("no position of the batches has a label")
    loss = loss_sum / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """The model's continuation of a text, or its answer to messages through the chat template.

    Args:
        prompt: plain text, or messages `{"role": ..., "content": ...}`.
        temperature: 0 takes the likeliest token each time; else sampling, from torch's global seed.

    Returns:
        The new text alone, without special tokens.
    """
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        **(sampling if temperature > 0 else greedy),
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


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
