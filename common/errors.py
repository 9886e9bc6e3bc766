"""The one exception that means "the user can fix this", and how its line is worded."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a path or the data.

    The message is one line: what was found, what was expected, what to do. `main.py` prints it
    without a stack trace; every other exception is a fault of this code and keeps its trace.
    """


def one_of(name: str, found: str, options: Iterable[str]) -> str:
    """Returns `found`, or raises a `UserError` that lists `options` and suggests the nearest."""
    options = list(options)
    if found in options:
        return found
    near = difflib.get_close_matches(str(found), options, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    raise UserError(f'{name}="{found}" is unknown: use one of {", ".join(options)}{hint}')


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters; its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
