"""The flags of `main.py`; what is wrong with a command line is said in one line."""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from common import config as configs
from common.errors import UserError
from common.evaluate import settings

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "jax_contrastive")
_UNKNOWN = re.compile(r"Unknown command line flag '([^']+)'")
_SUGGESTION = re.compile(r'Did you mean "([^"]+)" instead of "([^"]+)"')


def define(
    evaluations: Iterable[str],
    values: flags.FlagValues = flags.FLAGS,
    argv: Sequence[str] | None = None,
) -> None:
    """Defines all flags.

    Args:
        evaluations: the modes that evaluate a workdir.
        values: where to.
        argv: the command line, which ml_collections reads already here; None is this process's.

    Raises:
        UserError: for an unknown --eval field, or a value of a wrong type.
    """
    argv = sys.argv if argv is None else list(argv)
    text, here = flags.DEFINE_string, {"flag_values": values}
    config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/simclr_demo.py, or with :smoke behind it.",
        sys_argv=argv, **here,
    )  # fmt: skip
    try:
        config_flags.DEFINE_config_dict(
            "eval", settings.default_config(), "How to evaluate, e.g. --eval.knn.k=20.",
            sys_argv=argv, **here,
        )  # fmt: skip
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(in_one_line(error, "--eval", "common/evaluate/settings.py")) from error
    text("workdir", None, "Where checkpoints, metrics and pictures go, or are.", **here)
    flags.DEFINE_enum(
        "mode", "train", ["train", "plan", "prepare", "import", "replay", *evaluations],
        "plan: only compile the train step and say what it costs; prepare: write the data as "
        "shards; import: a workdir with the weights of --config.init_from; replay: take the step "
        "again at which the run of --workdir diverged; the others evaluate that run.", **here,
    )  # fmt: skip
    flags.DEFINE_list(
        "topology", [], "With --mode=plan: TPU slices to plan for, e.g. v5e:4x8,v4:4x4x4.", **here
    )
    flags.DEFINE_bool(
        "quick", False, "With --topology: a fifth of the compile time; figures differ somewhat.",
        **here,
    )  # fmt: skip
    flags.DEFINE_bool(
        "distributed", False, "One process a host of a pod: join the others first.", **here
    )
    text("coordinator", "", "HOST:PORT,COUNT,INDEX, where JAX cannot find that out itself.", **here)
    text("compile_cache", CACHE, "Keeps compiled programs for the next start; '' = none.", **here)


def check(values: flags.FlagValues, evaluations: Iterable[str]) -> None:
    """Checks that the flags fit together.

    Raises:
        UserError: saying which one is missing or too many.
    """
    mode = values.mode
    if not values.workdir and mode != "plan":
        raise UserError("--workdir is missing: say where the results are to go, or are")
    of_a_run = mode == "replay" or mode in evaluations
    if of_a_run and values.config is not None:
        raise UserError(
            f"--mode={mode} takes the config from the workdir: leave --config out; what can be "
            "changed are --eval.NAME=VALUE (common/evaluate/settings.py)"
        )
    if not of_a_run and values.config is None:
        raise UserError("--config is missing: give a file, e.g. --config=configs/simclr_demo.py")
    if values.topology and mode != "plan":
        raise UserError(f"--topology goes with --mode=plan, not with --mode={mode}")
    if values.quick and not values.topology:
        raise UserError("--quick goes with --mode=plan and --topology=..., e.g. v5e:4x8")


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


@functools.cache
def _fields() -> tuple[str, ...]:
    """Every field of a config and of --eval, as a flag without its dashes."""
    base = configs.base_config("", ConfigDict())
    return tuple(
        f"{flag}.{name}"
        for flag, tree in (("config", base), ("eval", settings.default_config()))
        for name in configs.flatten(configs.as_dict(tree))
    )


def _elsewhere(name: str) -> str:
    """What to add about a flag that is none: fields of the same name in other sections, or ""."""
    flag, last = name.split(".")[0], name.split(".")[-1]
    near = [field for field in _fields() if field.split(".")[-1] == last]
    if flag in ("config", "eval"):
        near = [field for field in near if field.split(".")[0] == flag]
    if f"config.{last}" in near:
        near = [f"config.{last}"]
    if not near:
        return ""
    return f": did you mean {' or '.join(f'--{field}' for field in near[:3])}?"


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error is of a disk that is full, read-only or broken, and not of this code."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def in_one_line(
    error: BaseException, what: str = "the config", where_to_look: str = "common/config.py"
) -> str:
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
        name = path[1] if path else ""
        ours = f"configs/{os.path.basename(name)}"
        if name and name != ours and os.path.exists(ours):
            return f"no config file {name}: did you mean {ours}?"
        return (
            f"no config file {name}: --config needs a Python file with get_config(), e.g. "
            "configs/simclr_demo.py"
        )
    unknown = _UNKNOWN.search(str(error))
    if unknown and (near := _elsewhere(unknown[1])):
        return f"no flag --{unknown[1]}{near}"
    if match := _SUGGESTION.search(str(error)):
        text = f"{what} has no field {match[2]!r}: did you mean {match[1]!r}?"
    elif isinstance(error, (AttributeError, KeyError)):
        name = _bare(chain[-1])
        near = _elsewhere(f"{'eval' if what == '--eval' else 'config'}.{name}")
        text = f"{what} has no field {name!r}" + (near or f": see {where_to_look}")
    else:
        text = " ".join(str(chain[-1] if where else error).split())
    return (where[-1] if where else "") + text


def _bare(error: BaseException) -> str:
    return str(error).strip("\"'")
