"""Text and conversations -> token ids, with a mark on every token that is trained."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jinja2 import TemplateError

from loram.errors import refuse
from loram.formats import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import, and readers of rows do too

IGNORED = -100  # the label of a token that is not trained, as in torch and transformers

# Llama 3's templates write today's date unless they are given one.
CHAT_OPTIONS = {"date_string": "26 Jul 2024"}

MARK = "[answer 7f3d9ac1 "  # stands in an answer's place; no text is expected to hold it

# For base models without a template. Written so that a reader sees what the model sees, and so
# that every answer ends with the EOS at which generation stops.
DEFAULT_CHAT_TEMPLATE = (
    "{%- if bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{ message.content + '\n\n' }}"
    "{%- elif message.role == 'user' -%}{{ '### Instruction:\n' + message.content + '\n\n' }}"
    "{%- else -%}{{ '### Response:\n' + message.content + eos_token + '\n\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; a base model without a chat template gets the project's plain one."""
    from transformers import AutoTokenizer

    from loram.hub import split

    name, revision = split(path)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


class Document(NamedTuple):
    """One text or conversation.

    ids: int32[n], n >= 1; trained: bool[n], the tokens that give loss; truncated: cut at its end.
    """

    ids: np.ndarray
    trained: np.ndarray
    truncated: bool = False


def encode_text(text: str, tokenizer: "PreTrainedTokenizerBase") -> Document:
    """Every token trained, BOS first if the tokenizer adds one, EOS last.

    Raises:
        ValueError: the text is empty, or has half of a surrogate pair, which is no character.
        UserError: the tokenizer has no EOS token.
    """
    if not text.strip():
        raise ValueError("empty text")
    text.encode()
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids[-1] != end_of_text(tokenizer):
        ids.append(end_of_text(tokenizer))
    return Document(np.array(ids, np.int32), np.ones(len(ids), bool))


def encode_chat(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase", seq_len: int | None = None
) -> Document:
    """The conversation as the model's own chat template writes it.

    Trained are the content of every answer and what follows it up to the special token that ends
    the turn; a template that ends the last turn with no special token gets EOS there. A think
    block that the template adds to an answer by itself is not trained.

    Args:
        messages: as `formats.to_messages` gives them.
        tokenizer: a fast one with a chat template.
        seq_len: tokens kept; what is beyond is cut off. None: all.

    Raises:
        ValueError: the template refuses or rewrites the conversation, half of a surrogate pair is
            in it, or no trained token is left.
        UserError: the tokenizer has no EOS token.
    """
    text, answers = _render(messages, tokenizer)
    text.encode()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    special = np.isin(ids, _special_ids(tokenizer))
    trained = np.zeros(len(ids), bool)
    for start, end in answers:
        # A token that begins before the answer and reaches into it holds its first letters.
        trained |= (ends > start) & (starts < end) & (ends > starts)
        stop = int(np.argmax(special & (starts >= end)))
        if special[stop] and starts[stop] >= end and not text[end : starts[stop]].strip():
            trained[(starts >= end) & (np.arange(len(ids)) <= stop)] = True
        elif end == answers[-1][1]:
            length = int((starts < end).sum())
            ids = [*ids[:length], end_of_text(tokenizer)]
            trained = np.append(trained[:length], True)
    trained[0] = False  # nothing comes before it, so it cannot be predicted
    truncated = seq_len is not None and len(ids) > seq_len
    if not trained[:seq_len].any():
        raise ValueError(f"no token of an answer within the first {len(ids[:seq_len])}")
    return Document(np.array(ids[:seq_len], np.int32), trained[:seq_len], truncated)


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the EOS token.

    Raises:
        UserError: there is none.
    """
    if tokenizer.eos_token_id is None:
        refuse("tokenizer", f"no EOS token in {tokenizer.name_or_path}", "a tokenizer with one")
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """The id that fills rows up: the tokenizer's, or EOS if it has none, or one that was added to
    the tokenizer and of which the model has no embedding."""
    pad = tokenizer.pad_token_id
    return end_of_text(tokenizer) if pad is None or pad >= vocab_size else int(pad)


def _render(
    messages: list[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation's text, and where each answer starts and ends in it.

    The answers are found by writing the conversation a second time with a mark in each answer's
    place: what stands between the marks is the template's, and the same in both. This holds for
    templates that rewrite earlier turns as well, where the start of the text is no longer what
    the template writes for the first turns alone.
    """
    marks: list[tuple[str, str, str]] = []  # mark, reasoning before the answer, answer
    marked: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            # Templates of reasoning models cut here; the mark must be on the same side of the cut.
            head, tag, answer = message["content"].rpartition("</think>")
            marks.append((f"{MARK}{len(marks)}]", head + tag, answer))
            message = message | {"content": head + tag + marks[-1][0]}
        marked.append(message)
    text, rest = _apply(messages, tokenizer), _apply(marked, tokenizer)
    spans, position = [], 0
    for mark, reasoning, answer in marks:
        before, _, rest = rest.partition(mark)
        after = rest.partition(MARK)[0]
        start = position + len(before)
        for form in (answer, answer.lstrip(), answer.rstrip(), answer.strip()):
            if text.startswith(before, position) and text.startswith(form + after, start):
                break
        else:
            raise ValueError("the chat template changes an answer beyond recognition")
        position = start + len(form)
        kept = text.rfind(reasoning.strip(), 0, start) if reasoning else -1
        spans.append((kept if kept >= start - len(before) else start, position))
    return text, spans


def _apply(messages: list[Message], tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **CHAT_OPTIONS)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from None


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
