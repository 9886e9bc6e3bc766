"""The config of a run: defaults, checks, and what may change on resume."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from common import eval_fields, fields
from common.errors import UserError, one_of
from common.fields import AUTO, Field


def _by_name(sections: Mapping[str, Mapping[str, Field]]) -> dict[str, Field]:
    return {
        f"{section}.{name}".lstrip("."): field
        for section, its_fields in sections.items()
        for name, field in its_fields.items()
    }


# Every field by its full name, e.g. "data.source"; without the section of the method.
FIELDS = _by_name(fields.CONFIG)
EVAL_FIELDS = _by_name(eval_fields.EVAL)
_BOTH = FIELDS | {f"eval.{name}": field for name, field in EVAL_FIELDS.items()}
BEFORE = {n: f.before for n, f in FIELDS.items() if f.before is not ...} | fields.METHODS_BEFORE


def base_config(method: str, method_config: ConfigDict) -> ConfigDict:
    """Defaults of every field; a config file starts from these and changes some.

    Args:
        method: name of the method, which is also the name of its section.
        method_config: that section.

    Returns:
        A locked `ConfigDict`; `common/fields.py` says what each field means. Durations are strings:
        "100 epochs", "500 steps", "5 %".
    """
    c = _section(fields.CONFIG[""])
    c.method = method
    c[method] = method_config
    return _add_sections(c, fields.CONFIG).lock()


def section(name: str, /, **changes: Any) -> ConfigDict:
    """One section of the config, not locked: its defaults, except for `changes`.

    Args:
        name: "data", "model", "augment" ...
        **changes: fields of the section.

    Raises:
        KeyError: no such section or field.
    """
    c = _section(fields.CONFIG[name]).lock()
    c.update(changes)
    return c.unlock()


def eval_config() -> ConfigDict:
    """The locked defaults of `--eval`; `common/eval_fields.py` says what each field means."""
    return _add_sections(_section(eval_fields.EVAL[""]), eval_fields.EVAL).lock()


def _add_sections(c: ConfigDict, sections: Mapping[str, Mapping[str, Field]]) -> ConfigDict:
    for name, its_fields in sections.items():
        if name:
            c[name] = _section(its_fields)
    return c


def _section(its_fields: Mapping[str, Field]) -> ConfigDict:
    c = ConfigDict()
    for name, field in its_fields.items():
        if field.kind:
            c[name] = config_dict.placeholder(field.kind)
        if field.default is not None:
            c[name] = field.default
    return c


def one_of_field(name: str, found: str) -> str:
    """Returns `found`, or raises a `UserError` if the field `name` does not allow that value.

    Args:
        name: e.g. "optimizer.name", or "eval.features" for a field of `--eval`.
        found: its value.
    """
    return one_of(name, found, _BOTH[name].one_of)


def check(config: ConfigDict) -> None:
    """Checks bounds, and what no builder sees alone; the builders check their own sections.

    Raises:
        UserError: with the field, its value and the values allowed.
    """
    for name, value in flat(config).items():
        field = FIELDS.get(name)
        if is_open(name, value):
            continue
        if field and field.least is not None and value < field.least:
            raise UserError(f"{name}={value} is too small: expected at least {field.least}")
        if field and field.one_of:
            one_of_field(name, value)
    if config.init_from and config.resume_from:
        raise UserError(
            f"init_from={config.init_from} and resume_from={config.resume_from}: a run starts from "
            "one of them, leave the other out"
        )
    largest = max(config.data.image_size, config.augment.size or 0)
    if 0 < config.data.shrink < largest:
        raise UserError(
            f"data.shrink={config.data.shrink} makes photographs smaller than the {largest} pixels "
            f"of what is made of them: set it to {largest} or more (twice is enough), or to 0"
        )
    b, groups = config.batch_size, config.model.bn_groups
    if b % groups:
        divisors = [g for g in range(1, b + 1) if b % g == 0]
        near = sorted(sorted(divisors, key=lambda g: abs(g - groups))[:6])
        raise UserError(
            f"model.bn_groups={groups} does not divide batch_size={b}: choose a divisor of it, "
            f"e.g. {', '.join(map(str, near))}"
        )
    if config.data.augment_on not in ("host", "both", "device"):
        raise UserError(
            f"data.augment_on={config.data.augment_on!r}: choose host, both (colour and blur on "
            "the device) or device (all of it, with the dataset in device memory)"
        )
    if config.steps_per_dispatch > 1 and config.data.augment_on != "device":
        raise UserError(
            f"steps_per_dispatch={config.steps_per_dispatch} needs the data on the device: set "
            "data.augment_on=device, or 1 step"
        )
    if config.model.dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"model.dtype={config.model.dtype!r}: choose float32 or bfloat16")
    if config.evaluate.knn_temperature <= 0:
        raise UserError(
            f"evaluate.knn_temperature={config.evaluate.knn_temperature}: expected more than 0"
        )


def as_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON: tuples become lists, placeholders None."""
    return json.loads(config.to_json_best_effort())


def flat(config: ConfigDict) -> dict[str, Any]:
    """Every field of a config by its full name, with its value as in JSON."""
    return flatten(as_dict(config))


def update(config: ConfigDict, saved: dict[str, Any], where: str) -> None:
    """Sets the fields of a config to what `as_dict` returned; lists become tuples again.

    Fields that are newer than `saved` get what the code did before it had them.

    Raises:
        UserError: for a field that this version of the code does not have.
    """
    saved = flatten(saved)
    _set(config, _before(config, saved) | saved, where)


def as_begun(config: ConfigDict, saved: dict[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    """The config with which to resume a run that began under `saved`.

    A field that is "auto" (or open, see `is_open`) gets the value decided when the run began, and
    a field that is newer than the run what the code did without it.

    Returns:
        A copy, and those newer fields for which `config` has another value.
    """
    saved, current = flatten(saved), flat(config)
    decided = {
        n: saved[n]
        for n, value in current.items()
        if n in saved and (value == AUTO or is_open(n, value))
    }
    newer = {n: v for n, v in _before(config, saved).items() if current[n] != v}
    begun = config.copy_and_resolve_references()
    _set(begun, decided | newer, "")
    return begun, newer


def with_decided(
    saved: dict[str, Any], current: dict[str, Any], section: str = ""
) -> dict[str, Any]:
    """A saved config (as JSON) in which the fields that are open have the values of another."""
    return {
        name: with_decided(value, current[name], f"{section}{name}.")
        if isinstance(value, dict) and name in current
        else current.get(name, value)
        if value == AUTO or is_open(section + name, value)
        else value
        for name, value in saved.items()
    }


def is_open(name: str, value: Any) -> bool:
    """Whether a field's value stands for one that is decided when a run begins (`Field.auto`)."""
    auto = FIELDS[name].auto if name in FIELDS else fields.METHODS_AUTO.get(name)
    return auto is not None and value == auto and not isinstance(value, bool)


def _before(config: ConfigDict, saved: dict[str, Any]) -> dict[str, Any]:
    """What the code did without the fields that a config has and a saved one (flat) lacks."""
    return {n: BEFORE[n] for n in BEFORE.keys() & flat(config).keys() - saved.keys()}


def _set(config: ConfigDict, values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        section, *rest = config, *name.split(".")
        try:
            for part in rest[:-1]:
                section = section[part]
            with section.ignore_type():
                section[rest[-1]] = tuple(value) if isinstance(value, list) else value
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{where} has a field {name!r} that this version of the code does not know: use "
                "the version that wrote it"
            ) from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a.b": value}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flatten(value, path + ".") if isinstance(value, dict) else {path: value}
    return found


def check_same_run(saved: dict[str, Any], current: dict[str, Any], workdir: str) -> None:
    """Refuses to resume a run under a config that would have trained something else.

    Raises:
        UserError: naming the fields that differ.
    """
    a, b = flatten(saved), flatten(current)

    def same(name: str) -> bool:
        field = FIELDS.get(name, Field(None, ""))  # one of the method's own, or of another version
        if field.free:
            return True
        if name in a:  # what `--mode=import` left is not decided yet
            return a[name] == b.get(name, ...) or is_open(name, a[name])
        # a field that the code of the run did not have yet
        return b[name] == BEFORE[name] if name in BEFORE else not b[name]

    differing = sorted(n for n in a.keys() | b.keys() if not same(n))
    kinds = {str(c.get("data.source")).partition(":")[0] for c in (a, b)}
    if kinds in ({"folder"}, {"shards"}) and "data.source" in differing:
        differing.remove("data.source")  # the loop sees whether it is the same listing
    if "method" in differing and "method" in a:  # and so most of the other fields differ
        before, now = a["method"], b["method"]
        mode = " with --mode=distil" if before == "distil" else ""
        raise UserError(
            f"{workdir} holds a run of the method {before}, and this is one of {now}: give another "
            f"--workdir, or the command of that run{mode} to continue it"
        )
    if differing:
        shown = ", ".join(
            f"{n} (was {a.get(n, 'absent')!r}, now {b.get(n, 'absent')!r})" for n in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        advice = (
            "give another --workdir, or the config of that run (its config.json) to continue it"
        )
        if differing == ["duration"]:  # most likely a finished run that should train for longer
            advice = (
                "its learning rates follow from that, so train on in a new --workdir, with "
                f"--config.resume_from={workdir} --config.resume_optimizer"
            )
        verb = "differs" if len(differing) == 1 else "differ"
        raise UserError(
            f"{workdir} holds the run of another config: {shown}{more} {verb}; {advice}"
        )
