"""The loss falls on the answers and the tokens that end them, in the templates of every family."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from loram.data import DEFAULT_CHAT_TEMPLATE, encode_chat, encode_text
from loram.errors import UserError

# Modelled on what the families publish, cut down to what these tests need.
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
QWEN3 = (  # thoughts are dropped from all answers but the last, which gets an empty one if need be
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set thought = '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"

TALK = [
    {"role": "user", "content": "Say yes."},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Say yes and no."},
    {"role": "assistant", "content": "yes and\n no 🦙"},
]


@pytest.fixture
def smol(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def dressed(tokenizer, template, specials=(), plain=(), **named):
    """The tokenizer with another template and the special tokens that the template needs."""
    for token in (*specials, *named.values()):
        tokenizer.add_tokens(AddedToken(token, special=True, normalized=False), special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer.add_special_tokens(named)
    tokenizer.chat_template = template
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama 2's kind: spaces become part of the next word, BOS is added."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = [turn["content"] for turn in TALK] + ["[INST] [/INST] Say yes and no"] * 9
    inner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=specials))
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def answers(document, tokenizer) -> list[str]:
    """The text of each run of trained tokens."""
    runs = np.split(np.arange(len(document.ids)), np.flatnonzero(np.diff(document.trained)) + 1)
    return [tokenizer.decode(document.ids[run]) for run in runs if document.trained[run[0]]]


def test_chatml_trains_answers_and_their_end(smol):
    document = encode_chat(TALK, smol, 512)
    assert answers(document, smol) == ["yes<|im_end|>", "yes and\n no 🦙<|im_end|>"]
    whole = smol.apply_chat_template(TALK)["input_ids"]
    assert document.ids.tolist() == whole, "not what stock transformers feeds the model"


@pytest.mark.parametrize(
    ("template", "specials", "expected"),
    [
        (LLAMA3, {"bos_token": "<|begin_of_text|>"}, "<|eot_id|>"),
        (CHATML, {"eos_token": "<|endoftext|>"}, "<|im_end|>"),
        (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"}, "</s>"),
        (DEFAULT_CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}, "</s>"),
    ],
    ids=["llama3", "qwen2", "mistral", "default"],
)
def test_templates_of_the_families(smol, template, specials, expected):
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = dressed(smol, template, headers, **specials)
    document = encode_chat(TALK, tokenizer, 512)
    found = [text.removeprefix(" ") for text in answers(document, tokenizer)]
    assert found == [f"yes{expected}", f"yes and\n no 🦙{expected}"]
    if bos := specials.get("bos_token"):
        first = tokenizer.convert_tokens_to_ids(bos)
        assert document.ids[0] == first and (document.ids == first).sum() == 1


def test_a_tokenizer_that_joins_spaces_to_words_keeps_first_words_and_adds_no_second_bos():
    tokenizer = metaspace()
    tokenizer.chat_template = LLAMA2
    document = encode_chat(TALK, tokenizer, 512)
    assert document.ids[0] == tokenizer.bos_token_id and document.ids[1] != tokenizer.bos_token_id
    found = [re.sub(r"^ | (?=</s>)", "", text) for text in answers(document, tokenizer)]
    assert found == ["yes</s>", "yes and\n no 🦙</s>"]
    plain = encode_text("Say yes", tokenizer)
    assert tokenizer.decode(plain.ids) == "<s> Say yes</s>"


def test_history_that_the_template_rewrites(smol):
    tokenizer = dressed(smol, QWEN3, plain=["<think>", "</think>"])
    # Without thoughts: the empty think block that the template adds gives no loss.
    assert answers(encode_chat(TALK, tokenizer, 512), tokenizer) == [
        "yes<|im_end|>",
        "yes and\n no 🦙<|im_end|>",
    ]
    # With thoughts: dropped from the first answer, trained in the last one.
    thoughtful = [
        turn | {"content": f"<think>\nyes?\n</think>\n\n{turn['content']}"}
        if turn["role"] == "assistant"
        else turn
        for turn in TALK
    ]
    assert answers(encode_chat(thoughtful, tokenizer, 512), tokenizer) == [
        "yes<|im_end|>",
        "<think>\nyes?\n</think>\n\nyes and\n no 🦙<|im_end|>",
    ]


def test_a_template_without_an_end_of_turn_gets_eos_after_the_last(smol):
    smol.chat_template = BARE
    document = encode_chat(TALK, smol, 512)
    assert [text.strip() for text in answers(document, smol)] == [
        "yes",
        "yes and\n no 🦙<|im_end|>",
    ]
    assert document.ids[-1] == smol.eos_token_id


def test_the_date_of_today_is_not_in_the_data(smol):
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = dressed(smol, LLAMA3, headers, bos_token="<|begin_of_text|>")
    assert "26 Jul 2024" in tokenizer.decode(encode_chat(TALK, tokenizer, 512).ids)


def test_too_long_is_cut_at_the_end_and_flagged(smol):
    whole = encode_chat(TALK, smol, 512)
    assert not whole.truncated
    size = len(whole.ids) - 4
    cut = encode_chat(TALK, smol, size)
    assert cut.truncated and len(cut.ids) == size
    assert cut.ids.tolist() == whole.ids[:size].tolist()
    assert not answers(cut, smol)[-1].endswith("<|im_end|>")
    with pytest.raises(ValueError, match="no token of an answer within the first 8"):
        encode_chat(TALK, smol, 8)


def test_conversations_that_the_template_refuses_or_spoils_are_bad_rows(smol):
    tokenizer = dressed(smol, MISTRAL, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="refuses it: roles must alternate"):
        encode_chat(TALK[:1] + TALK, tokenizer, 512)
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content | upper)")
    with pytest.raises(ValueError, match="beyond recognition"):
        encode_chat(TALK, tokenizer, 512)


def test_text_ends_with_eos_once(smol):
    document = encode_text("A short text.", smol)
    assert smol.decode(document.ids) == "A short text.<|im_end|>"
    assert document.trained.all()
    with pytest.raises(ValueError, match="empty"):
        encode_text(" \n", smol)
    smol.eos_token = None
    with pytest.raises(UserError, match="^tokenizer: found no EOS token"):
        encode_text("text", smol)
