"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in a config, a path or the data.

    The message is one line: what was found, what was expected, what to do. `main.py` prints it
    without a stack trace; every other exception is a fault of this code and keeps its trace.
    """
