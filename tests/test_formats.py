"""Every known form of an instruction row becomes the same messages; a malformed row says why."""

import pytest

from loram.errors import UserError
from loram.formats import detect, to_messages

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}


def turns(*pairs: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def test_multi_turn_forms_agree():
    openhermes = {
        "conversations": [
            {"from": NAMES[turn["role"]], "value": turn["content"], "weight": None}
            for turn in TURNS
        ],
        "source": "x",
    }
    assert detect(openhermes) == "sharegpt"
    assert to_messages(openhermes, "sharegpt") == TURNS
    assert to_messages({"messages": TURNS}, detect({"messages": TURNS})) == TURNS


def test_single_turn_forms():
    orca = {"id": 1, "system_prompt": "Be brief.", "question": "One?", "response": "1"}
    assert to_messages(orca, detect(orca)) == TURNS[:3]
    assert to_messages(orca | {"system_prompt": ""}, "openorca") == TURNS[1:3]

    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert to_messages(alpaca, detect(alpaca))[0]["content"] == "Add.\n\n1 and 2"
    for nothing in ({"input": ""}, {"input": None}, {}):
        row = {"instruction": "Add.", "output": "3"} | nothing
        assert to_messages(row, detect(row))[0]["content"] == "Add."


def test_what_follows_the_last_answer_is_left_out():
    row = turns(("user", "a"), ("assistant", "b"), ("user", "and?"))
    assert [turn["content"] for turn in to_messages(row, "messages")] == ["a", "b"]


def test_unknown_columns_are_refused_with_what_is_accepted():
    with pytest.raises(UserError, match=r"^instruct.sources: found columns 'prompt', 'text'; acc"):
        detect(["text", "prompt"], "instruct.sources")


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        (turns(("user", "a"), ("assistant", " ")), "messages", "empty answer"),
        (turns(("user", ""), ("assistant", "b")), "messages", "empty question"),
        (turns(("user", "a")), "messages", "no answer"),
        ({"messages": []}, "messages", "no list of turns"),
        ({"messages": "hello"}, "messages", "no list of turns"),
        ({"messages": ["hello"]}, "messages", "no object"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages", "is list"),
        (turns(("user", "a"), ("system", "x"), ("assistant", "b")), "messages", "not the first"),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            "sharegpt",
            "role 'function_call', not one of",
        ),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "is NoneType"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "sharegpt", "role"),
        ({"instruction": "a", "output": 7}, "alpaca", "the answer is int, no text"),
        ({"instruction": None, "output": "b"}, "alpaca", "'instruction' is NoneType"),
        ({"question": "a", "response": ""}, "openorca", "empty answer"),
        ({"text": "another form"}, "openorca", "the question is NoneType"),
    ],
)
def test_malformed_rows_say_why(row, form, reason):
    with pytest.raises(ValueError, match=reason):
        to_messages(row, form)
