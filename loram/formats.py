"""Instruction rows of the usual forms -> messages, the one form that chat templates take."""

from collections.abc import Iterable, Mapping
from typing import Any

from loram.errors import refuse

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": str}

# form -> the columns that mark it, looked for in this order
FORMS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "openorca": ("question", "response"),
    "alpaca": ("instruction", "output"),
}
ACCEPTED = (
    "a 'messages' column (role, content), a 'conversations' column (from, value), "
    "'question' and 'response' with an optional 'system_prompt', "
    "or 'instruction' and 'output' with an optional 'input'"
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def known_form(columns: Iterable[str]) -> str | None:
    """The form of rows with these columns, a key of `FORMS`, if it is one of them."""
    there = set(columns)
    return next((form for form, needed in FORMS.items() if there.issuperset(needed)), None)


def detect(columns: Iterable[str], setting: str = "source") -> str:
    """As `known_form`.

    Raises:
        UserError: no form has these columns; lists those that are accepted.
    """
    there = set(columns)
    if form := known_form(there):
        return form
    refuse(setting, f"columns {', '.join(map(repr, sorted(there))) or 'none'}", ACCEPTED)


def to_messages(row: Mapping[str, Any], form: str) -> list[Message]:
    """The row's conversation: at most one system message, first, and an answer as the last turn.

    Questions after the last answer are left out: there is nothing in them to learn from.

    Args:
        row: one row; columns that the form does not need are ignored.
        form: a key of `FORMS`.

    Raises:
        ValueError: the row is malformed; the text is a short reason.
    """
    if form == "messages":
        turns = _turns(row, "messages", "role", "content")
    elif form == "sharegpt":
        turns = _turns(row, "conversations", "from", "value")
    elif form == "openorca":
        turns = _pair(row.get("system_prompt"), row.get("question"), row.get("response"))
    else:
        turns = _pair(None, _alpaca_question(row), row.get("output"))
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise ValueError("no answer")
    for position, turn in enumerate(turns):
        if turn["role"] == "system" and position:
            raise ValueError("a system message that is not the first")
        if turn["role"] != "system" and not turn["content"].strip():
            raise ValueError("empty answer" if turn["role"] == "assistant" else "empty question")
    if turns[0]["role"] == "system" and not turns[0]["content"].strip():
        del turns[0]
    return turns


def _turns(row: Mapping[str, Any], column: str, role_key: str, text_key: str) -> list[Message]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{column!r} is no list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn in {column!r} is no object")
        role, text = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role {role!r}, not one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _text(text, f"{text_key!r} of a turn")})
    return messages


def _pair(system: Any, question: Any, answer: Any) -> list[Message]:
    first = [] if system is None else [{"role": "system", "content": _text(system, "system")}]
    return [
        *first,
        {"role": "user", "content": _text(question, "the question")},
        {"role": "assistant", "content": _text(answer, "the answer")},
    ]


def _alpaca_question(row: Mapping[str, Any]) -> str:
    instruction = _text(row.get("instruction"), "'instruction'")
    more = row.get("input")
    if more is None or not _text(more, "'input'").strip():
        return instruction
    return f"{instruction}\n\n{more}"


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, no text")
    return value
