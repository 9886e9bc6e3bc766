"""The config every run starts from, its checks, and what of it may change on resume."""

import json
from typing import Any

from ml_collections import ConfigDict

from common import optim
from common.data.augment import presets
from common.data.sources.opening import default_config
from common.errors import UserError, one_of
from common.models import probe

# What may differ between a run and its continuation: none of these changes a training step that
# was taken, or what a score means.
FREE_ON_RESUME = (
    "log_every",
    "profile",
    "on_nonfinite",
    "max_skipped",
    "checkpoint",
    "evaluate.every",
    "evaluate.batch_size",
    "evaluate.pictures",
    "data.dir",
    "data.cache_gib",
    "data.on_corrupt",
    "model.remat",
    "microbatch",
    "tpu_compiler_options",
    "steps_per_dispatch",
)

# What the code did before a field was there, where that is not the default: a run without the field
# goes on, and is evaluated, as it began.
BEFORE: dict[str, Any] = {
    "data.labels": "legacy",
    "data.value_range": "upper8",
    "data.jpeg": "fast",
    "simclr.loss_scale": 1.0,
    "model.conv_init": "he",
    "model.stem_init": "",
    "model.zero_init_residual": True,
    "head.init": "lecun",
}
# A field that is "auto" is decided when a run begins, and once: its config.json keeps it.
AUTO = "auto"
DECIDED = ("data.value_range",)

_AT_LEAST = {
    "seed": 0,
    "batch_size": 2,  # one image has no others to be told from
    "microbatch": 0,
    "log_every": 1,
    "steps_per_dispatch": 1,
    "data.image_size": 1,
    "data.shuffle_buffer": 1,
    "model.bn_groups": 1,
    "evaluate.knn_k": 0,
    "evaluate.knn_examples": 0,
    "evaluate.batch_size": 0,
    "max_skipped": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
}


def base_config(method: str, method_config: ConfigDict) -> ConfigDict:
    """Defaults of every field; a config file starts from here and changes what it must.

    Args:
        method: name of the method, which is also the name of its section.
        method_config: that section.

    Returns:
        A locked `ConfigDict`; `common/fields.py` says what each field means. Durations are strings:
        "100 epochs", "500 steps", "5 %".
    """
    c = ConfigDict()
    c.method = method
    c.seed = 0
    c.batch_size = 256
    c.microbatch = 0
    c.duration = "100 epochs"
    c.log_every = 50
    c.init_from = ""
    c.resume_from = ""
    c.resume_optimizer = False
    c.on_nonfinite = "stop"
    c.max_skipped = 10
    c.steps_per_dispatch = 1
    c.profile = ""
    c.tpu_compiler_options = True
    c[method] = method_config
    c.data = default_config()
    c.augment = presets.default_config("simclr")
    c.augment_view2 = presets.default_config(None)  # None everywhere: as view 1
    c.model = ConfigDict(
        {
            "depth": 50,
            "stages": (),
            "width": 64,
            "width_multiplier": 1,
            "stem": "imagenet",
            "bn_groups": 1,
            "dtype": "float32",
            "remat": "none",
            "fold_norm": True,
            "conv_init": "he",
            "stem_init": "",
            "zero_init_residual": True,
        }
    )
    c.head = ConfigDict({"kind": "simclr", "layers": 2, "hidden": 0, "dim": 128})
    c.head.init = "lecun"  # lecun (Flax) | torch (PyTorch's linear layers) | normal (SimCLR) | he
    c.optimizer = optim.default_config()
    c.probe = probe.default_config()
    c.evaluate = ConfigDict(
        {
            "every": "10 %",
            "knn_k": 0,
            "knn_temperature": 0.1,
            "knn_center": False,
            "knn_examples": 0,
            "batch_size": 0,
            "pictures": True,
        }
    )
    c.checkpoint = ConfigDict(
        {
            "every": "5 %",
            "keep": 2,
            "keep_every": "0 steps",
            "keep_best": 0,
        }
    )
    return c.lock()


def check(config: ConfigDict) -> None:
    """Checks what no builder sees alone; the builders check their own sections.

    Raises:
        UserError: naming the field, what was found and what would do.
    """
    for field, least in _AT_LEAST.items():
        value = config
        for name in field.split("."):
            value = value[name]
        if value < least:
            raise UserError(f"{field}={value} is too small: expected at least {least}")
    one_of("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    if config.init_from and config.resume_from:
        raise UserError(
            f"init_from={config.init_from} and resume_from={config.resume_from}: a run starts from "
            "one of them, leave the other out"
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
            "the device) or device (all of it, with the data set in device memory)"
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
    """The config as JSON has it: tuples become lists, placeholders None."""
    return json.loads(config.to_json_best_effort())


def update(config: ConfigDict, saved: dict[str, Any], where: str) -> None:
    """Sets the fields of a config to what `as_dict` gave, lists becoming tuples again.

    Fields that are newer than what was saved get what the code did before they were there.

    Raises:
        UserError: for a field that this version of the code does not have.
    """
    saved = flatten(saved)
    _set(config, _before(config, saved) | saved, where)


def as_begun(config: ConfigDict, saved: dict[str, Any]) -> tuple[ConfigDict, dict[str, Any]]:
    """The config with which a run goes on that began under `saved`.

    What was "auto" then is as it was decided, and fields that are newer than the run are what the
    code did without them.

    Returns:
        A copy, and those newer fields for which `config` asks something else.
    """
    saved, current = flatten(saved), flatten(as_dict(config))
    decided = {n: saved[n] for n, value in current.items() if value == AUTO and n in saved}
    newer = {n: v for n, v in _before(config, saved).items() if current[n] != v}
    begun = config.copy_and_resolve_references()
    _set(begun, decided | newer, "")
    return begun, newer


def with_decided(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """A saved config (as JSON has it) with the values of another for what is "auto" in it."""
    return {
        name: with_decided(value, current[name]) if isinstance(value, dict) and name in current
        else current.get(name, value) if value == AUTO else value
        for name, value in saved.items()
    }  # fmt: skip


def _before(config: ConfigDict, saved: dict[str, Any]) -> dict[str, Any]:
    """What `BEFORE` says of the fields that a config has and a saved one (flat) has not."""
    return {n: BEFORE[n] for n in BEFORE.keys() & flatten(as_dict(config)).keys() - saved.keys()}


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


def _kind(source: Any) -> str:
    return str(source).partition(":")[0]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict to {"a.b": value}."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, path + ".") if isinstance(value, dict) else {path: value}
    return flat


def check_same_run(saved: dict[str, Any], current: dict[str, Any], workdir: str) -> None:
    """Refuses to continue a run under a config that would have trained something else.

    Raises:
        UserError: naming the fields that differ.
    """
    a, b = flatten(saved), flatten(current)

    def free(name: str) -> bool:
        return any(name == field or name.startswith(field + ".") for field in FREE_ON_RESUME)

    def same(name: str) -> bool:
        if name in a:  # what `--mode=import` left is not decided yet
            return a[name] == b.get(name, ...) or (a[name] == AUTO and name in DECIDED)
        # a field that the code of the run did not have yet; without an entry it is one that is off
        return b[name] == BEFORE[name] if name in BEFORE else not b[name]

    differing = {n for n in a.keys() | b.keys() if not free(n) and not same(n)}
    if {_kind(c.get("data.source")) for c in (a, b)} in ({"folder"}, {"shards"}):
        differing.discard("data.source")  # the loop sees whether it is the same listing
    differing = sorted(differing)
    if differing:
        shown = ", ".join(
            f"{n} (was {a.get(n, 'absent')!r}, now {b.get(n, 'absent')!r})" for n in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        advice = (
            "give another --workdir, or the config of that run (its config.json) to continue it"
        )
        if differing == ["duration"]:  # a finished run that is to train for longer, most likely
            advice = (
                "its learning rates follow from that, so train on in a new --workdir, with "
                f"--config.resume_from={workdir} --config.resume_optimizer"
            )
        raise UserError(
            f"{workdir} holds the run of another config: {shown}{more} differ; {advice}"
        )
