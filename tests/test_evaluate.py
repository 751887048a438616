"""Perplexity and generation."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from rows import packed_rows
from transformers import AutoTokenizer

from loram.evaluate import generate, perplexity, stop_tokens
from loram.packing import batches


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_rows(tmp_path_factory.mktemp("packed") / "rows", documents=30)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(packed):
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, batches(packed, np.arange(packed.rows), 4))
    assert found["perplexity"] == pytest.approx(128, rel=1e-6)
    assert found["loss"] == pytest.approx(math.log(128), rel=1e-6)
    assert found["tokens"] == packed.info["trained_tokens"]


def test_perplexity_does_not_depend_on_the_batches_nor_change_the_model(packed):
    model = tiny_model("qwen2").train()
    before = [w.clone() for w in model.parameters()]
    ids = np.arange(packed.rows)
    ones, fives = (perplexity(model, batches(packed, ids, n), dtype=torch.float32) for n in (1, 5))
    assert ones["loss"] == pytest.approx(fives["loss"], rel=1e-6)
    # By hand, each document alone: what came before it in the row must not matter.
    total = 0.0
    for batch in batches(packed, ids, 1):
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [packed.seq_len]
        for start, end in zip(starts, starts[1:], strict=False):
            labels = batch["labels"][:, start:end]
            if (labels != -100).any():
                loss = model(batch["input_ids"][:, start:end], labels=labels).loss
                total += loss.item() * (labels[:, 1:] != -100).sum().item()
    assert ones["loss"] == pytest.approx(total / ones["tokens"], rel=1e-5)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nothing_to_evaluate(packed):
    with pytest.raises(ValueError, match="no position"):
        perplexity(tiny_model("llama"), [])


@pytest.fixture(scope="module")
def writer(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0)


def test_generation_is_greedy_and_returns_the_new_text_alone(writer, tokenizer):
    ids = tokenizer("Two and two", return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, writer(ids).logits[:, -1:].argmax(-1)], 1)
    text = generate(writer, tokenizer, "Two and two", max_new_tokens=8)
    assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_messages_go_through_the_chat_template(writer, tokenizer):
    messages = [{"role": "user", "content": "Two and two?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    ours = generate(writer, tokenizer, messages, max_new_tokens=8)
    assert ours == generate(writer, tokenizer, text, max_new_tokens=8)


def test_sampling_follows_the_seed(writer, tokenizer):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(writer, tokenizer, "Two", max_new_tokens=8, temperature=2.0))
    assert texts[0] == texts[1] != texts[2]


def test_generation_ends_where_the_template_ends_a_turn(writer, tokenizer):
    """Also where that is neither the model's EOS nor the tokenizer's, as in Llama 3."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="<|endoftext|>")
    assert writer.config.eos_token_id == other.eos_token_id == 0 != end
    assert stop_tokens(writer, other) == [0, end]
    head = writer.get_output_embeddings()
    before, head.bias = head.bias, torch.nn.Parameter(torch.zeros(len(tokenizer)))
    head.bias.data[end] = 1e4  # the first token that it writes
    try:
        ids = writer.generate(
            torch.tensor([[5]]), eos_token_id=stop_tokens(writer, other), max_new_tokens=9
        )
        assert ids.tolist() == [[5, end]]
        assert generate(writer, other, "Two", max_new_tokens=9) == ""
    finally:
        head.bias = before
