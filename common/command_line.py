"""Reads the command line, and says in one line what is wrong with it."""

import errno
import re
import traceback

from absl import flags

from common.errors import UserError

_SUGGESTION = re.compile(r'Did you mean "([^"]+)" instead of "([^"]+)"')


def parse(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses all flags; `app.run(main, flags_parser=parse)`.

    Args:
        argv: the program's name and its arguments.
        values: the flags, "config" and "workdir" among them.

    Returns:
        The program's name and the arguments that are no flags.

    Raises:
        UserError: unknown flag or config field, value of a wrong type, missing flag or config file,
            a mistake inside `get_config`.
    """
    try:
        rest = values(argv)
        # A file that could not be read raises only when the config is used.
        getattr(values.config, "method", None)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(in_one_line(error)) from error
    return rest


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error is of a disk that is full, read-only or broken, and not of this code."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def in_one_line(error: BaseException) -> str:
    """What a person needs to know of an error of absl, ml_collections or `get_config`."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    frames = [f for e in chain for f in traceback.extract_tb(e.__traceback__)]
    where = [f"{f.filename}, line {f.lineno}: " for f in frames if f.name == "get_config"]
    for e in reversed(chain):  # ml_collections wraps one in another of its class
        if isinstance(e, UserError):
            return str(e)
    if "Failed loading config file" in str(error):
        path = re.search(r"Attempted \[.*\]:\s+(.+)", str(error))
        return (
            f"no config file {path[1] if path else ''}: --config needs a Python file with "
            "get_config(), e.g. configs/simclr_demo.py"
        )
    if match := _SUGGESTION.search(str(error)):
        text = f"the config has no field {match[2]!r}: did you mean {match[1]!r}?"
    elif isinstance(error, (AttributeError, KeyError)):
        text = f"the config has no field {str(chain[-1]).strip(chr(39))!r}: see common/config.py"
    else:
        text = " ".join(str(chain[-1] if where else error).split())
    return (where[-1] if where else "") + text
