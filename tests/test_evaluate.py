"""Perplexity and generation."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_model
from rows import packed_rows
from transformers import AutoTokenizer

from loram.data import encode_chat
from loram.evaluate import (
    Problem,
    final_number,
    generate,
    perplexity,
    problems,
    stop_tokens,
    strict_match,
)
from loram.packing import Packed, batches, best_fit, write_packed


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


def test_a_loss_that_is_not_finite_is_no_result(packed):
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="held-out tokens is nan"):
        perplexity(model, batches(packed, range(2), 2))


@pytest.fixture(scope="module")
def writer(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0)


def test_generation_is_greedy_and_returns_the_new_text_alone(writer, tokenizer, monkeypatch):
    """Whatever the model's directory says of generation, as Qwen2.5-Instruct's of repetition."""
    monkeypatch.setattr(writer.generation_config, "repetition_penalty", 0.01)
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


def test_a_template_that_writes_the_date_writes_that_of_training(writer, tokenizer):
    """As Llama 3's do: the model must see on any day what it saw when it was trained."""
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    asked = [{"role": "user", "content": "Two and two?"}]
    answered = [*asked, {"role": "assistant", "content": "4"}]
    trained = other.decode(encode_chat(answered, other, 64).ids)
    prompt = trained.partition("?")[0] + "?"
    assert "Two and two?" in prompt != other.apply_chat_template(asked, tokenize=False)
    ours = generate(writer, other, asked, max_new_tokens=8)
    assert ours == generate(writer, other, prompt, max_new_tokens=8)


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


QUESTIONS = {"Two and two?": "It is\n#### 4", "And three more, what is it then?": "#### 1,007"}


@pytest.fixture(scope="module")
def solved(tokenizer, tmp_path_factory):
    """Packed conversations, and a model that has learnt their answers by heart."""
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        for question, text in QUESTIONS.items()
    ]
    documents = [encode_chat(chat, tokenizer, 128) for chat in chats]
    path = tmp_path_factory.mktemp("solved")
    write_packed(path, best_fit(documents, 128), seq_len=128, pad_id=0)
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [
        (torch.tensor(d.ids)[None].long(), torch.tensor(np.where(d.trained, d.ids, -100))[None])
        for d in documents
    ]
    for _ in range(60):
        loss = sum(model(ids, labels=labels.long()).loss for ids, labels in rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Packed(path), model.eval()


def test_problems_are_the_conversations_of_packed_rows(solved, tokenizer):
    found = list(problems(solved[0]))
    assert {tokenizer.decode(p.answer) for p in found} == {
        text + "<|im_end|>" for text in QUESTIONS.values()
    }
    for problem in found:
        prompt = tokenizer.decode(problem.prompt)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert sum(question in prompt for question in QUESTIONS) == 1


def test_a_later_turn_is_no_part_of_the_problem(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "#### 1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "#### 2"},
    ]
    document = encode_chat(chat, tokenizer, 128)
    write_packed(tmp_path, best_fit([document, document], 256), seq_len=256, pad_id=0)
    found = list(problems(Packed(tmp_path)))
    assert len(found) == 2
    assert {tokenizer.decode(p.answer) for p in found} == {"#### 1<|im_end|>"}


@pytest.mark.parametrize("size", [1, 2])
def test_strict_match_counts_right_final_numbers(solved, tokenizer, size):
    asked = list(problems(solved[0]))
    options = {"size": size, "max_new_tokens": 24, "dtype": torch.float32}
    assert len({len(problem.prompt) for problem in asked}) == 2  # one is padded
    found = strict_match(solved[1], tokenizer, asked, **options)
    assert found == {"strict_match": 1.0, "answered": 2}
    other = tokenizer("#### 5")["input_ids"]
    wrong = [Problem(asked[0].prompt, other), asked[1]]
    assert strict_match(solved[1], tokenizer, wrong, **options)["strict_match"] == 0.5
    # A reference without a number is no problem of this kind.
    unmarked = [Problem(asked[0].prompt, tokenizer("It is 4")["input_ids"])]
    found = strict_match(solved[1], tokenizer, [*unmarked, asked[1]], **options)
    assert found == {"strict_match": 1.0, "answered": 1}
    assert strict_match(solved[1], tokenizer, unmarked, **options) == {}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("12 * 2 = 24\n#### 24", "24"),
        ("#### 1,234.", "1234"),
        ("#### -3.5\n", "-3.5"),
        ("#### 5\n\nNext: #### 7", "5"),
        ("The answer is 24.", None),
        ("####", None),
        ("#### none", None),
    ],
)
def test_only_a_marked_number_counts(answer, number):
    assert final_number(answer) == number
