"""Contents of rows -> token ids; a plain function on batches, Ray only calls it."""

import json
from functools import lru_cache

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from loram.data import encode_chat, encode_text, load_tokenizer
from pipelines.spool import NOTHING, to_table


def tokenise(table: pa.Table, tokenizer: str, seq_len: int | None) -> pa.Table:
    """A table of CONTENTS -> one of spool.SCHEMA, with `reason` for each bad row, and `failure`.

    Args:
        seq_len: most tokens of a conversation; None: as many as it has.
    """
    opened, documents, reasons = _tokenizer(tokenizer), [], []
    for text, reason in zip(table["content"].to_pylist(), table["reason"].to_pylist(), strict=True):
        document = NOTHING
        if text is not None:
            row = json.loads(text)
            try:
                chat = isinstance(row, list)
                document = encode_chat(row, opened, seq_len) if chat else encode_text(row, opened)
            except ValueError as error:
                reason = str(error)
        documents.append(document)
        reasons.append(reason)
    encoded = to_table(table["rank"].to_numpy(), documents)
    encoded = encoded.append_column("reason", pa.array(reasons, pa.string()))
    return encoded.append_column("failure", table["failure"])


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(path)
