"""From a shell: `python -m loram recover | merge | generate`."""

import argparse
import logging
import sys
from pathlib import Path

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it complains when it is imported

from loram.adapter import open_adapted, recover  # noqa: E402
from loram.data import load_tokenizer  # noqa: E402
from loram.errors import UserError, refuse  # noqa: E402
from loram.evaluate import generate  # noqa: E402
from loram.merge import merge  # noqa: E402
from loram.model import check_weights, load, read_config  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loram", description="LoRAM without a pipeline."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser(
        "recover", help="re-shape an adapter of a pruned model for the full one"
    )
    verb.add_argument("adapter", type=Path)
    verb.add_argument("pruned", type=Path, help="the pruned model directory")
    verb.add_argument("base", help="the full model, a directory or a hub id")
    verb.add_argument("out", type=Path)
    verb = verbs.add_parser("merge", help="write a model with the adapter added to its weights")
    verb.add_argument("base")
    verb.add_argument("adapter", type=Path)
    verb.add_argument("out", type=Path)
    verb = verbs.add_parser("generate", help="answer one question")
    verb.add_argument("base")
    verb.add_argument("question")
    verb.add_argument("--adapter", type=Path)
    verb.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args(words)
    try:
        read_config(options.base, "base")
        if options.verb == "generate":
            if Path(options.base).is_dir():
                check_weights(Path(options.base), "base")
            device = "auto" if torch.cuda.is_available() else "cpu"
            model = (
                open_adapted(options.base, options.adapter, device=device)
                if options.adapter
                else load(options.base, device=device)
            )
            messages = [{"role": "user", "content": options.question}]
            tokenizer = load_tokenizer(options.base)
            print(generate(model, tokenizer, messages, max_new_tokens=options.max_new_tokens))
            return 0
        if options.out.exists():
            refuse("out", f"{options.out}, which exists", "a directory to be made")
        if options.verb == "recover":
            recover(options.adapter, options.pruned, options.base, options.out)
        else:
            merge(options.base, options.adapter, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
