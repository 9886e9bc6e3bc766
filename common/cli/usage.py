"""The text of `python main.py -h`, and the tables of docs/reference/config.md."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from common import config as configs

_COLUMNS = 80
_NAMES = 34  # columns for a name and its default
_LINES = (
    "python main.py --config=FILE --workdir=DIR [--config.NAME=VALUE ...]",
    "python main.py --mode=MODE --workdir=DIR [--eval.NAME=VALUE ...]",
    "python main.py --mode=compare --workdirs=DIR,DIR,... [--workdir=DIR]",
)
# The modes that evaluate a run.
_EVALUATIONS = {
    "embed": "features of the test split (without labels: of all images), and a report with "
    "pictures (docs/embed.md)",
    "knn": "classify the test images by their nearest training images",
    "linear_eval": "train a linear classifier on the features",
    "finetune": "train the whole network on a fraction of the labels",
    "classify": "score a network that finetune or distil has left in the workdir",
    "transfer": "logistic regression on the features of other datasets",
    "suggest": "a list of the images to label first, and a page that shows them",
    "label": "label all images from a table of a few labels",
    "export": "write the encoder for other programs (docs/export.md)",
}
_SECOND = "augment_view2."  # has the same fields as `augment`


def text(
    values: flags.FlagValues,
    modes: dict[str, str],
    methods: Mapping[str, Any],
    config: ConfigDict | None = None,
) -> str:
    """All modes, flags and fields, in 80 columns.

    Args:
        values: the flags.
        modes: meanings of those modes that train.
        methods: by name; the fields of their sections are listed one after the other.
        config: whose values are shown; None: the defaults.
    """
    lines = ["usage:", *(f"  {line}" for line in _LINES), "", "modes (--mode=NAME):"]
    parser = values["mode"].parser
    assert isinstance(parser, flags.EnumParser)
    for mode in parser.enum_values:
        lines += _row(mode, (modes | _EVALUATIONS)[mode])
    lines += ["", "flags:"]
    for name in flags_of(values):
        if name != "eval":
            lines += _row(f"--{name}", values[name].help.rpartition(">: ")[2])
    whose = "values of this --config" if config is not None else "with their defaults"
    lines += ["", f"--config.NAME=VALUE, {whose}:"]
    for section in of_methods(methods, config):
        for name, value, meaning in section:
            lines += _row(f"{name}={shown(value)}", meaning)
    lines += ["", "--eval.NAME=VALUE, with their defaults:"]
    for name, value, meaning in of_eval():
        lines += _row(f"{name}={shown(value)}", meaning)
    return "\n".join(lines)


def flags_of(values: flags.FlagValues) -> list[str]:
    """The names of our own flags, in the order of their definition."""
    ours = ("config", "workdir", "mode", "workdirs", "topology", "quick", "distributed",
            "coordinator", "compile_cache", "eval")  # fmt: skip
    return [name for name in ours if name in values]


def of_methods(
    methods: Mapping[str, Any], config: ConfigDict | None = None
) -> Iterator[list[tuple[str, Any, str]]]:
    """(name, default, meaning) of every field, by section; each method's own among them.

    Of the second view only the fields that differ from the first.

    Args:
        methods: by name.
        config: whose fields and values; None: the defaults of all methods.
    """
    rows: dict[str, dict[str, tuple[str, Any, str]]] = {}
    if config is not None:
        method = config.get("method", "")
        methods = {method: methods.get(method)}
    for method, make in methods.items():
        tree = configs.base_config(method, make.default_config()) if config is None else config
        texts = meanings(method, make)
        for name, value in configs.flat(tree).items():
            if name.startswith(_SECOND) and name != f"{_SECOND}preset" and value is None:
                continue
            section = name.rpartition(".")[0]
            rows.setdefault(section, {}).setdefault(name, (name, value, texts.get(name, "")))
    # the methods' sections side by side, after the fields without a section
    order = sorted(rows, key=lambda section: (section != "", section not in methods))
    yield from (list(rows[section].values()) for section in order)


def of_eval() -> list[tuple[str, Any, str]]:
    """(name, default, meaning) of every field of `--eval`."""
    return [
        (name, value, configs.EVAL_FIELDS[name].meaning)
        for name, value in configs.flat(configs.eval_config()).items()
    ]


def meanings(method: str, make: Any) -> dict[str, str]:
    """The meaning of every field of a method's config, in no order.

    Args:
        method: its name.
        make: its class; `MEANINGS` says what the fields of its section mean.
    """
    own = getattr(make, "MEANINGS", {})  # of a method that nobody has, none
    return {name: field.meaning for name, field in configs.FIELDS.items()} | {
        f"{method}.{name}": text for name, text in own.items()
    }


def markdown(methods: Mapping[str, Any]) -> str:
    """The tables of docs/reference/config.md."""
    parts = []
    for section in of_methods(methods):
        name = section[0][0].rpartition(".")[0]
        parts.append(_table(f"config.{name}" if name else "config", "config", section))
    parts.append(_table("eval", "eval", of_eval()))
    return "\n".join(parts)


def _table(title: str, tree: str, rows: list[tuple[str, Any, str]]) -> str:
    lines = [f"## `--{title}`", "", "| flag | default | meaning |", "| --- | --- | --- |"]
    for name, value, meaning in rows:
        default = f"`{shown(value)}`" if shown(value) else "empty"
        lines.append(f"| `--{tree}.{name}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def shown(value: Any) -> str:
    """A value as written on a command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _row(name: str, meaning: str) -> list[str]:
    """A name and its meaning, the second column wrapped."""
    room = _COLUMNS - _NAMES - 1
    wrapped = textwrap.wrap(meaning, room, break_long_words=False) or [""]
    first = f"  {name}".ljust(_NAMES - 1)
    lines = [f"{first} {wrapped[0]}".rstrip()] if len(first) < _NAMES else [first, *(
        [" " * _NAMES + wrapped[0]])]  # fmt: skip
    return [*lines, *(" " * _NAMES + line for line in wrapped[1:])]
