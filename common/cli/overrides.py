"""`--config.NAME=VALUE` and `--eval.NAME=VALUE`: changes of a config on the command line.

Every mistake is reported in one line: the flag, its value and what was expected.
"""

import difflib
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from common import config as configs
from common import fields
from common.errors import UserError

_OVERRIDE = re.compile(r"--?(no)?(config|eval)\.([^=]+)(?:=(.*))?", re.DOTALL)
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
_BY_TYPE = {int: 32, float: 0.5, bool: True, tuple: (0.5,)}  # examples for fields without a value
# Names of fields in other projects.
_OTHER_NAMES = {
    "bs": "batch_size",
    "epochs": "duration",
    "lr": "learning_rate",
    "num_epochs": "duration",
    "steps": "duration",
    "tau": "temperature",
    "wd": "weight_decay",
}
ALL = "`python main.py -h` lists all of them"
_OF_BOTH = ("encoder", "bn_groups", "dtype", "remat")  # fields of `model` that a ViT reads too
_ALIKE = 0.65  # by `_likeness`; the best, and those that come near to it, are suggested
_AS_GOOD = 0.04


def apply(argv: Sequence[str], trees: Mapping[str, ConfigDict | None]) -> list[str]:
    """Applies the flags `--config.NAME=VALUE` and `--eval.NAME=VALUE`.

    Values are read by the type of the field. None, where a field may be None, leaves the choice to
    the preset; true and false can be written `--config.NAME` and `--noconfig.NAME`; a tuple is
    written `1,2,3` or `(1, 2, 3)`; of a field given twice the last value counts.

    Args:
        argv: the program's name and its arguments.
        trees: "config" and "eval", which change; None where there is none.

    Returns:
        The other arguments.

    Raises:
        UserError: no such field, a value of another type, or a field that neither encoder nor head
            reads.
    """
    given: dict[str, str] = {}
    rest = _applied(argv, trees, given)
    config = trees["config"]
    if config is not None and "vit" in config:  # not every config file is one of a run
        _check_encoder(given, config.model.encoder)
        _check_head(given, config.head.kind)
    return rest


def refuse_section(argv: Sequence[str], section: str, method: str) -> None:
    """Refuses changes of a section that is of another method than the one that is trained.

    Args:
        argv: the program's name and its arguments.
        section: of the method that the config file is of.
        method: the one that is trained.
    """
    for argument in argv[1:]:
        match = _OVERRIDE.fullmatch(argument)
        if match and section != method and match[3].startswith(f"{section}."):
            raise UserError(
                f"--config.{match[3]} is a field of the method {section}, of which --mode={method} "
                f"uses nothing: leave it out; the fields of {method} are --config.{method}.NAME"
            )


def refuse_without_mode(argv: Sequence[str], sections: Iterable[str]) -> None:
    """Refuses fields of methods that only `--mode` names, where it names none of them.

    Args:
        argv: the program's name and its arguments.
        sections: of these methods.
    """
    for argument in argv[1:]:
        match = _OVERRIDE.fullmatch(argument)
        section = match[3].partition(".")[0] if match else ""
        if match and match[2] == "config" and section in sections:
            raise UserError(
                f"--config.{match[3]} is a field of --mode={section}: add it, or leave the field "
                "out"
            )


def _applied(
    argv: Sequence[str], trees: Mapping[str, ConfigDict | None], given: dict[str, str]
) -> list[str]:
    """`apply`, which collects the flags of fields of "config" that were given, by name."""
    rest, remaining = [argv[0]], iter(argv[1:])
    for argument in remaining:
        match = _OVERRIDE.fullmatch(argument)
        if argument == "--":
            return [*rest, argument, *remaining]
        if not match:
            rest.append(argument)
            continue
        off, tree, name, text = match.groups()
        flag = f"--{off or ''}{tree}.{name}"
        config = trees[tree]
        if config is None:
            raise UserError(
                f"{flag} is a field of a config, and there is no --config=FILE: give one; a mode "
                "that evaluates takes the config from the workdir, so leave the flag out there"
            )
        section, last = _find(config, flag, name)
        given |= {name: flag} if tree == "config" else {}
        kind = section.get_type(last)
        if kind is bool and text is None:
            text = str(not off)
        elif text is None and not off:
            text = next(remaining, "--")
            text = None if text.startswith("--") else text  # that is the next flag
        if text is None or (off and kind is not bool):
            raise UserError(f"{flag} has no value: write --{tree}.{name}=VALUE")
        section[last] = _value(flag, text, kind, name, section[last], _may_be_none(tree, name))
    return rest


def _check_encoder(given: Mapping[str, str], encoder: str) -> None:
    """Refuses what would be ignored: `vit.*` without a ViT, sizes of a ResNet with one."""
    for name, flag in given.items():
        section, _, field = name.partition(".")
        if section == "vit" and encoder != "vit":
            raise UserError(
                f"{flag} has no effect on a ResNet: add --config.model.encoder=vit, or leave it out"
            )
        if section == "model" and encoder == "vit" and field not in _OF_BOTH:
            raise UserError(
                f"{flag} has no effect on a ViT, whose sizes are config.vit: leave it out"
            )


def _check_head(given: Mapping[str, str], kind: str) -> None:
    """Refuses a number of layers where the kind of head fixes it."""
    if "head.layers" in given and kind in ("moco_v1", "moco_v2"):
        raise UserError(
            f"{given['head.layers']} has no effect: a head of the kind {kind} has "
            f"{'one layer' if kind == 'moco_v1' else 'two layers'}, leave it out"
        )


def near(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the names `known` that the user may have meant by `name`."""
    first, dot, last = name.rpartition(".")
    name = first + dot + _OTHER_NAMES.get(last, last)
    scores = {field: _likeness(name, field) for field in known}
    least = max(_ALIKE, max(scores.values(), default=0) - _AS_GOOD)
    return [field for field, score in scores.items() if score >= least][:3]


def did_you_mean(names: Sequence[str]) -> str:
    """Returns "did you mean --a or --b?"."""
    return f"did you mean {' or '.join(f'--{name}' for name in names)}?"


def _likeness(found: str, field: str) -> float:
    """Similarity from 0 to 1; the last part of a name counts most."""
    a, b = found.split("."), field.split(".")
    whole, last = "_".join(a), b[-1]
    alike = max(_ratio(a[-1], last), _ratio(whole, last))
    parts = sorted((a[-1], last), key=len)
    if parts[1].startswith(parts[0] + "_") or parts[1].endswith("_" + parts[0]):
        alike = max(alike, 0.9)  # blur_probability, knn_temperature
    return 0.6 * alike + 0.4 * _ratio(whole, "_".join(b))


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _find(config: ConfigDict, flag: str, name: str) -> tuple[ConfigDict, str]:
    """The section that has a field, and the name of the field in it."""
    section, *rest = config, *name.split(".")
    for part in rest[:-1]:
        section = section.get(part) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or rest[-1] not in section:
        tree = flag.removeprefix("--").removeprefix("no").partition(".")[0]
        other = "eval" if tree == "config" else "config"
        known = configs.EVAL_FIELDS if other == "eval" else configs.FIELDS
        names = [f"{tree}.{n}" for n in near(name, configs.flat(config))]
        names += [f"{other}.{name}"] if name in known else []
        hint = did_you_mean(names) if names else ALL
        raise UserError(f"{flag}: there is no such field; {hint}")
    return section, rest[-1]


def _may_be_none(tree: str, name: str) -> bool:
    """Whether the field may be None: it belongs to a preset."""
    section, _, last = name.partition(".")
    return tree == "config" and section in ("augment", "augment_view2") and (
        name != "augment.preset" and last in fields.AUGMENT)  # fmt: skip


def _value(flag: str, text: str, kind: type, name: str, now: Any, may_be_none: bool) -> Any:
    """Parses `text` as a value of a field of type `kind`."""
    if kind is ConfigDict:
        raise UserError(
            f"{flag}={text}: {name} is a section; set its fields, e.g. {flag}.{next(iter(now))}="
        )
    if text == "None":
        if may_be_none or now is None:
            return None
        field = (configs.FIELDS | configs.EVAL_FIELDS).get(name)
        meaning = field.meaning if field else ""
        raise UserError(
            f"{flag}=None: this field always has a value; leave the flag out for the config's"
            + (f", or write {flag}= for none" if now == "" or "empty" in meaning else "")
        )
    if kind is str:
        return text
    if kind not in _BY_TYPE:
        raise UserError(f"{flag}: no flag can set a {kind.__name__}; change it in the config file")
    field = configs.FIELDS.get(name)
    example: Any = field.example if field else None
    if not example:
        example = now if now not in (None, ()) else _BY_TYPE[kind]
    try:
        return _tuple(text, example) if kind is tuple else _number(text, kind)
    except ValueError:
        pass
    shown, expected = str(example).lower() if kind is bool else str(example), _EXPECTED.get(kind)
    if kind is tuple:
        shown = ",".join(map(str, example))
        expected = f"{_EXPECTED[_kinds(example)[0]]}, or several by commas"
    or_none = " (or None: the preset's)" if may_be_none else ""
    raise UserError(
        f"{flag}={text}: the field takes {expected}{or_none}, e.g. {shlex.quote(f'{flag}={shown}')}"
    )


def _number(text: str, kind: type) -> Any:
    if kind is bool:
        return flags.BooleanParser().parse(text)
    value = kind(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _kinds(example: Sequence[Any]) -> list[type]:
    """The types of the elements of this tuple, the strictest first."""
    return [kind for kind in (int, float, str) if any(type(x) is kind for x in example)]


def _tuple(text: str, example: Sequence[Any]) -> tuple:
    """Parses "1,2", "(1, 2)" or "[1, 2]"; the elements have the types of the example."""
    text = text.strip()
    for left, right in ("()", "[]"):
        if text.startswith(left) or text.endswith(right):
            if not (text.startswith(left) and text.endswith(right)):
                raise ValueError
            text = text[1:-1]
    parts = [part.strip().strip("\"'") for part in text.split(",")]
    parts = parts[:-1] if parts[-1] == "" else parts  # (1,) and ()
    return tuple(_element(part, _kinds(example)) for part in parts)


def _element(text: str, kinds: Sequence[type]) -> Any:
    if not text:
        raise ValueError
    for kind in kinds:
        try:
            return text if kind is str else _number(text, kind)
        except ValueError:
            if kind is kinds[-1]:
                raise
