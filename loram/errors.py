"""The one error that is a user's mistake rather than a fault of the program."""

from typing import NoReturn


class UserError(Exception):
    """A mistake in a setting or an input; its text is one line, all that the user is shown."""


def refuse(setting: str, found: object, accepted: str) -> NoReturn:
    """Raise `UserError` in the one form that every check uses.

    Args:
        setting: the recipe key, option or file that is wrong, as the user wrote it.
        found: what was there.
        accepted: what would have been right.
    """
    raise UserError(f"{setting}: found {found}; accepted: {accepted}")
