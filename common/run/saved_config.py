"""`config.json`, the resolved config of a run. Only this file reads or writes it."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError
from common.run import files

FILE = "config.json"


def read(workdir: epath.Path) -> dict[str, Any]:
    """What `config.json` holds, as `config.as_dict` made it.

    Raises:
        UserError: there is none, it is not JSON, or not a dictionary.
    """
    path = workdir / FILE
    if not path.exists():
        raise UserError(
            f"{workdir} holds no run (no config.json): give the --workdir that a run was trained in"
        )
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): restore it from a copy, or give another --workdir"
        ) from error
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} holds no config but a {type(saved).__name__}: restore it from a copy, or give "
            "another --workdir"
        )
    return saved


def write(workdir: epath.Path, config: dict[str, Any]) -> None:
    """Writes what `config.as_dict` made."""
    files.write_text(workdir / FILE, json.dumps(config, indent=2) + "\n")


def load(workdir: epath.Path, methods: Mapping[str, Any]) -> ConfigDict:
    """The config of the run in `workdir`, locked.

    Fields that are newer than the run get what the code did before it had them.

    Args:
        workdir: of a run.
        methods: the classes by name.

    Raises:
        UserError: no run, no JSON, an unknown method or field.
    """
    saved = read(workdir)
    name = saved.get("method")
    if not isinstance(name, str) or name not in methods:
        raise UserError(
            f"{workdir / FILE} is of the method {name!r}: expected one of {', '.join(methods)}"
        )
    config = configs.base_config(name, methods[name].default_config())
    configs.update(config, saved, str(workdir / FILE))
    return config


def moved_from(config: ConfigDict, workdir: epath.Path) -> str:
    """Where the data of the run in `workdir` was, if that is not where `config` has it; else ""."""
    saved = read(workdir)["data"]["source"]
    return saved if files.whole(saved) != files.whole(config.data.source) else ""


def note_changes(config: ConfigDict, workdir: epath.Path) -> None:
    """Writes where the data is now, and what was decided since `config.json` was written."""
    saved = read(workdir)
    before = saved["data"]["source"]
    current = configs.with_decided(saved, configs.as_dict(config))
    current["data"]["source"] = config.data.source
    if jax.process_index() != 0 or current == saved:
        return
    write(workdir, current)
    if files.whole(before) != files.whole(config.data.source):
        logging.warning(
            "the data of this run was %s and is now %s: config.json says so", before,
            config.data.source,
        )  # fmt: skip
