"""The flags of `main.py`; every mistake in a command line is reported in one line."""

import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from common import config as configs
from common.cli import config_file, overrides, usage
from common.errors import UserError
from common.run import files

CACHE = os.path.join(os.path.expanduser("~"), ".cache", "jax_contrastive")
MODES = {
    "train": "train, or resume the run of --workdir",
    "distil": "train a network of --config on what a fine-tuned one says of the images",
    "plan": "compile the train step and report its cost, without training",
    "prepare": "write the data as shards",
    "import": "make a workdir from the weights of --config.init_from",
    "replay": "repeat the step at which the run of --workdir diverged",
    "compare": "curves and a table of the runs of --workdirs, side by side",
}  # the others evaluate a run
_HELP = ("-h", "--help", "-help")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://[^\s,@]+")  # of "folder:gs://bucket/images@train"
_BAD = re.compile(r"flag --([^=]+)=(.*)", re.DOTALL)


def define(evaluations: Iterable[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines all flags.

    Args:
        evaluations: the modes that evaluate a workdir.
        values: where they are defined.
    """
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    text("config", None, "Config file, e.g. configs/simclr_demo.py; :smoke may be appended.")
    text("eval", None, "How to evaluate, e.g. --eval.knn.k=20.")
    text("workdir", None, "Directory of the run: checkpoints, metrics, pictures. With "
         "--mode=compare, where its files go; comparison/ unless given.")  # fmt: skip
    flags.DEFINE_enum(
        "mode", "train", [*MODES, *evaluations], "What to do, see above.", flag_values=values
    )
    flags.DEFINE_list(
        "workdirs", [], "With --mode=compare: runs/a,runs/b or 'runs/*', or NAME=runs/a,...",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "topology", [], "With --mode=plan: TPU slices to plan for, e.g. v5e:4x8,v4:4x4x4.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "quick", False, "With --topology: a fifth of the compile time; figures differ somewhat.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "distributed", False, "One process per host of a pod: join the others first.",
        flag_values=values,
    )  # fmt: skip
    text("coordinator", "", "HOST:PORT,COUNT,INDEX, if JAX cannot detect them itself.")
    text("compile_cache", CACHE, "Keeps compiled programs for the next start; '' = none.")


def check(values: flags.FlagValues, evaluations: Iterable[str], others: Sequence[str] = ()) -> None:
    """Checks that the flags fit together.

    Args:
        values: the flags, parsed.
        evaluations: the modes that evaluate a workdir.
        others: arguments that are no flags.

    Raises:
        UserError: naming the flag that is missing or does not fit.
    """
    mode = values.mode
    if mode == "compare":
        _check_compare(values, others)
        return
    if others:
        raise UserError(
            f"unexpected argument {others[0]!r}: options are --config.NAME=VALUE, in quotes if "
            "there is a space in them"
        )
    if values.workdirs:
        raise UserError(f"--workdirs goes with --mode=compare, and --mode={mode} takes --workdir")
    if not values.workdir and mode != "plan":
        raise UserError("--workdir is missing: say where the results are to go, or are")
    of_a_run = mode == "replay" or mode in evaluations
    if of_a_run and values.config is not None:
        raise UserError(
            f"--mode={mode} takes the config from the workdir: leave --config out; what can be "
            "changed are --eval.NAME=VALUE (docs/reference/config.md)"
        )
    if not of_a_run and values.config is None:
        raise UserError(f"--config is missing: give a file, e.g. --config={config_file.EXAMPLE}")
    if values.topology and mode != "plan":
        raise UserError(f"--topology goes with --mode=plan, not with --mode={mode}")
    for topology in values.topology:
        if not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
            raise UserError(
                f"--topology={topology} is no TPU slice: write e.g. v5e:4x8, or leave it out to "
                "plan for the devices of this machine"
            )
    if values.quick and not values.topology:
        raise UserError("--quick is for plans of slices: add --topology=..., e.g. v5e:4x8")


def _check_compare(values: flags.FlagValues, others: Sequence[str]) -> None:
    if others:  # `--workdirs runs/*`, of which the shell has made several
        raise UserError(
            f"unexpected argument {others[0]!r}: write --workdirs='runs/*' in quotes, or commas "
            "between the runs"
        )
    if not values.workdirs:
        raise UserError(
            "--mode=compare needs the runs: --workdirs=runs/a,runs/b, or --workdirs='runs/*'"
        )
    if values.config is not None:
        raise UserError("--mode=compare reads the config of each run, and takes no --config")


def parse(
    argv: list[str],
    values: flags.FlagValues = flags.FLAGS,
    methods: Mapping[str, Any] | None = None,
) -> list[str]:
    """Parses all flags; `app.run(main, flags_parser=parse)`. -h prints the help and ends.

    Args:
        argv: the program's name and its arguments.
        values: the flags as `define` defines them; `config` and `eval` become ConfigDicts.
        methods: by name.

    Returns:
        The program's name and the arguments that are no flags.

    Raises:
        UserError: unknown flag or config field, value of a wrong type, a mistake in the config
            file, or no argument at all.
    """
    methods = methods or {}
    if len(argv) == 1:
        raise UserError(
            f"nothing to do: try python main.py --config={config_file.EXAMPLE} "
            "--workdir=runs/simclr_demo, or -h for all that there is"
        )
    try:
        argv = values.read_flags_from_files(argv, force_gnu=False)
        name = _last(argv, "config")
        config = None if name is None else config_file.load(name)
        if config is not None and (method := _method_of(argv)) in methods:
            overrides.refuse_section(argv, config.get("method", ""), method)
            methods[method].adapt(config)
        elif config is not None:
            of_modes = methods.keys() & MODES.keys()
            overrides.refuse_without_mode(argv, of_modes - {config.get("method", "")})
        if any(argument in _HELP for argument in argv):
            try:
                print(usage.text(values, MODES, methods, config), flush=True)
            except BrokenPipeError:  # `-h | head`: the rest, also at the exit, goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        trees = {"config": config, "eval": configs.eval_config()}
        rest = overrides.apply(argv, trees)
        _all_have_values(rest, values)
        left = values(rest)
    except flags.Error as error:
        raise UserError(_in_one_line(error, values, methods)) from error
    if values.eval is not None:
        raise UserError(f"--eval={values.eval}: set one of its fields, e.g. --eval.knn.k=20")
    values["config"].value, values["eval"].value = trees["config"], trees["eval"]
    return left


def reach_stores(values: flags.FlagValues) -> None:
    """Checks that every object store named by the flags or the config answers.

    Raises:
        UserError: if one does not.
    """
    given = {"workdir": values.workdir, "workdirs": " ".join(values.workdirs)}
    given |= configs.flat(values.eval)
    given |= configs.flat(values.config) if values.config is not None else {}
    texts = [text for text in given.values() if isinstance(text, str)]
    for path in dict.fromkeys(path for text in texts for path in _REMOTE.findall(text)):
        files.reach(path)


def _method_of(argv: Sequence[str]) -> str:
    """The method that the command line asks for, whatever the config file is of; "" for none."""
    mode = _last(argv, "mode")
    of_students = any(x.removeprefix("-").startswith("-config.distil.") for x in argv)
    return "distil" if mode == "distil" or (mode == "plan" and of_students) else ""


def _last(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag on a command line, before absl parses it; None if it is absent."""
    found = None
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if argument == "--":
            break
        if flag in (f"--{name}", f"-{name}"):
            found = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return found


def _all_have_values(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Refuses `--workdir --mode=knn`, where absl would parse the second flag as a value."""
    for argument, after in zip(argv[1:], [*argv[2:], "--"], strict=True):
        name = argument.removeprefix("-").removeprefix("-")
        if argument == "--":
            break
        if argument != name and name in values and not values[name].boolean and (
            after.startswith("--")):  # fmt: skip
            raise UserError(f"--{name} stands alone, and needs a value: --{name}=VALUE")


def _in_one_line(error: flags.Error, values: flags.FlagValues, methods: Mapping[str, Any]) -> str:
    """The message of an absl error, in one line with a suggestion."""
    if isinstance(error, flags.UnrecognizedFlagError):
        known = {flag: flag for flag in usage.flags_of(values)}  # what follows may add to these
        trees = [("eval", configs.eval_config())]
        for method, make in methods.items():
            trees.append(("config", configs.base_config(method, make.default_config())))
        for tree, config in trees:
            known |= {field: f"{tree}.{field}" for field in configs.flat(config)}
        found = [known[name] for name in overrides.near(error.flagname, known)]
        hint = overrides.did_you_mean(found) if found else overrides.ALL
        return f"there is no flag --{error.flagname}: {hint}"
    reason = str(error.__cause__ or error.__context__ or "")
    if match := _BAD.fullmatch(str(error).removesuffix(f": {reason}")):
        name, value = match.groups()
        flag = values[name]
        if flag.boolean:
            return f"--{name}={value}: expected true or false, e.g. --{name}=true"
        if choices := getattr(flag.parser, "enum_values", None):
            found = [f"{name}={choice}" for choice in overrides.near(value, choices)]
            hint = f"; {overrides.did_you_mean(found)}" if found else ""
            return f"--{name}={value}: expected one of {', '.join(choices)}{hint}"
    return " ".join(str(error).split())
