"""The real assets, as `make assets` wrote them, and how they are written."""

import json
import re

import pytest
import torch
from reasoning_gym import create_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram.errors import UserError
from pipelines import assets


@pytest.fixture(scope="module")
def real():
    made = assets.prepare(assets.home())
    before = made.stat().st_ino
    assert assets.prepare(assets.home()).stat().st_ino == before, "a second call made them anew"
    return made


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_model_is_an_ordinary_checkpoint_that_knows_english(real):
    tokenizer = AutoTokenizer.from_pretrained(real / assets.MODEL)
    model = AutoModelForCausalLM.from_pretrained(real / assets.MODEL, dtype="auto")
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.pad_token_id == end
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192

    ids = tokenizer((real / "wiki.txt").read_text()[:4000], return_tensors="pt").input_ids[:, :256]
    shuffled = ids[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        perplexity, of_shuffled = (model(input_ids=x, labels=x).loss.exp() for x in (ids, shuffled))
    # With q and k rows in GGUF's order, or without the rotary base, both would be alike.
    assert perplexity < 40 and of_shuffled > 1000


def test_the_chat_template_ends_turns_with_the_eos_token(real):
    tokenizer = AutoTokenizer.from_pretrained(real / assets.MODEL)
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n")


def test_text_and_instructions_are_there_in_the_forms_they_are_known_by(real):
    assert [len(rows(real / f"{n}.jsonl")) for n in ("c4", "alpaca", "glaive")] == [300, 999, 300]
    assert all(row["text"].strip() for row in rows(real / "c4.jsonl"))
    assert all(
        {"instruction", "input", "output"} == set(row) for row in rows(real / "alpaca.jsonl")
    )
    turns = [turn for row in rows(real / "glaive.jsonl") for turn in row["conversations"]]
    assert {turn["from"] for turn in turns} == {"human", "gpt", "function_call", "observation"}
    articles = (real / "wiki.txt").read_text(encoding="utf-8").split("\n\n")
    assert len(articles) == 30 and not any("\n" in article.strip() for article in articles)


def test_no_template_of_a_word_problem_is_in_both_files(real):
    train, test = rows(real / "gsm_train.jsonl"), rows(real / "gsm_test.jsonl")
    assert (len(train), len(test)) == (assets.TRAIN_ROWS, assets.TEST_ROWS)
    # Which template made a question is asked of the generator again, not read from the column.
    data = create_dataset("gsm_symbolic", size=6400, seed=0)
    made_by = {problem["question"]: t for problem, t in zip(data, data.task_indices, strict=True)}
    seen, held_out = (
        {made_by[r["messages"][0]["content"]] for r in part} for part in (train, test)
    )
    assert len(held_out) == 17 and len(seen) == 68 and not seen & held_out
    questions = [row["messages"][0]["content"] for row in train + test]
    assert len(set(questions)) == len(questions)
    assert all(re.search(r"#### \S+$", row["messages"][1]["content"]) for row in train + test)


def test_a_missing_package_is_named_with_what_installs_it():
    with pytest.raises(UserError, match=r"^package no-such: found not installed; .*make install"):
        assets._installed("no-such")


def test_without_a_registry_one_line_says_what_was_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"^assets: llamafactory could not be fetched.*\S$"):
        assets._write_text(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_nothing_and_an_old_version_is_replaced(tmp_path, monkeypatch):
    def crash(out):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_write_model", lambda out: out.mkdir())
    monkeypatch.setattr(assets, "_write_tiny_model", lambda out, model: None)
    monkeypatch.setattr(assets, "_write_text", crash)
    with pytest.raises(KeyboardInterrupt):
        assets.prepare(tmp_path)
    assert not list(tmp_path.iterdir())

    old = tmp_path / "assets"
    old.mkdir()
    (old / "assets.json").write_text('{"version": 0}')
    (old / "left over").touch()
    monkeypatch.setattr(assets, "_write_text", lambda out: (out / "c4.jsonl").touch())
    assert assets.prepare(tmp_path) == old
    names = {path.name for path in old.iterdir()}
    assert names == {assets.MODEL, "assets.json", "c4.jsonl", "gsm_train.jsonl", "gsm_test.jsonl"}
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]
