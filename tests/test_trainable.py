"""Rows that give nothing to train, and tokens that the model does not know, before a run begins."""

import pytest
from transformers import AutoTokenizer

from loram.data import pad_id
from loram.errors import UserError
from pipelines.check import check_trainable


def test_no_trainable_token(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    talk = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes"}]
    short = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "yes"}]
    check_trainable([talk], "instruct.sources", tokenizer, 128, 49_152, 0.01)
    check_trainable([talk, *[short] * 49], "instruct.sources", tokenizer, 32, 49_152, 0.01)
    with pytest.raises(UserError, match="found 2 of the first 50 rows without a trained token"):
        check_trainable([talk, talk, *[short] * 48], "a", tokenizer, 32, 49_152, 0.01)
    with pytest.raises(UserError, match="found 2 of the first 2 rows without a trained token"):
        check_trainable([talk, talk], "a", tokenizer, 32, 49_152, 1.0)


def test_a_token_without_an_embedding(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    talk = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "yes"}]
    check_trainable([talk], "instruct.sources", tokenizer, 128, 49_152, 0.01)
    assert pad_id(tokenizer, 49_153) == 49_152
    assert pad_id(tokenizer, 49_152) == tokenizer.eos_token_id
    talk[0]["content"] = "word <pad>"
    with pytest.raises(UserError, match="^model: found a tokenizer with '<pad>', id 49152, and"):
        check_trainable([talk], "instruct.sources", tokenizer, 128, 49_152, 0.01)
