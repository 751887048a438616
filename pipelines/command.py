"""What the commands on a recipe share: how it is given, quiet libraries, one line for a failure."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from huggingface_hub.utils import disable_progress_bars

from loram.errors import UserError
from pipelines.execute import StepFailed


def parsed(
    parser: argparse.ArgumentParser, words: list[str] | None, change: str
) -> argparse.Namespace:
    """The arguments, `recipe` and `changes` among them; change: what one may be, for --help."""
    parser.add_argument("recipe", nargs="?", default="small", help="a name, or a recipe.json")
    parser.add_argument("changes", nargs="*", metavar="key=value", help=change)
    given = parser.parse_intermixed_args(words)
    if "=" in given.recipe:  # changes alone
        given.recipe, given.changes = "small", [given.recipe, *given.changes]
    return given


def command(go: Callable[[], int]) -> int:
    """Run a command quietly; a failure becomes one line and an exit status."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"} | os.environ
    disable_progress_bars()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        return go()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StepFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
