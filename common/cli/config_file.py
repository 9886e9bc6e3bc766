"""`--config=FILE`: loads a Python file with a function `get_config`, and locates its errors."""

import difflib
import glob
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator

from ml_collections import ConfigDict

from common.errors import UserError

EXAMPLE = "configs/simclr_demo.py"
_FIELD = re.compile(r'Did you mean "([^"]+)" instead of "([^"]+)"')  # of ml_collections


def load(text: str) -> ConfigDict:
    """What `get_config` of a config file returns, locked.

    Args:
        text: "FILE" or "FILE:ARGUMENT".

    Raises:
        UserError: no such file, or a mistake in it, with its line.
    """
    path, colon, argument = text.partition(":")
    if not os.path.isfile(path):
        ours = {_stem(file): file for file in glob.glob("configs/*_*.py")}
        if near := difflib.get_close_matches(_stem(path), ours, n=1):
            file = ours[near[0]]
            raise UserError(f"no config file {path}: did you mean {file}{colon}{argument}?")
        raise UserError(
            f"no config file {path or repr(path)}: --config needs a Python file with get_config(), "
            f"e.g. {EXAMPLE}"
        )
    name = "config_of_" + re.sub(r"\W", "_", path)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # there is one for every file loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their module
    try:
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(): write one as in {EXAMPLE}")
        config = module.get_config(argument) if colon else module.get_config()
        if not isinstance(config, ConfigDict):
            raise UserError(f"get_config() of {path} returns no ConfigDict: see {EXAMPLE}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(_in_a_file(error, path)) from error
    return config.lock()


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".py")


def _in_a_file(error: Exception, path: str) -> str:
    """The error in a config file, with its line."""
    here = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else here[-1] if here else None
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if match := _FIELD.search(" ".join(str(e) for e in _causes(error))):
        text = f"the config has no field {match[2]!r}: did you mean {match[1]!r}?"
    elif isinstance(error, SyntaxError):
        text = f"this is no Python ({error.msg})"
    return f"{path}{f', line {line}' if line else ''}: {text}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
