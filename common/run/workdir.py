"""The directory of a run, and which run it belongs to."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError
from common.run import csv_copy, files, jsonl, lock, saved_config, tracking
from common.sharding import first_process

# What a run may leave in its workdir before the first step.
OWN_FILES = {
    saved_config.FILE,
    jsonl.FILE,
    jsonl.DISCARDED,
    csv_copy.FILE,
    tracking.FILE,
    "tensorboard",
    "checkpoints",
    "augmented_pairs.png",
    "nearest_neighbours_before.png",
    "resumed_from.json",
    "teacher.safetensors",
    "nonfinite",
    lock.FILE,
}


@contextlib.contextmanager
def claim(
    workdir: str | epath.PathLike, config: ConfigDict
) -> Iterator[tuple[epath.Path, lock.Lock | None]]:
    """Claims `workdir` for this run: writes `config.json`, or checks that the existing one agrees.

    A context manager; while it is open no other run can claim the directory.

    Yields:
        The directory, and on process 0 the lock.

    Raises:
        UserError: if the directory holds another run, or files but no run, or is in use.
    """
    workdir, refusal, held = files.path(workdir), None, None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                _make(workdir)
                held = stack.enter_context(lock.hold(workdir))
                _claim(workdir, configs.as_dict(config))
            except UserError as error:
                refusal = error
            except OSError as error:
                reason = error.strerror or error
                refusal = UserError(
                    f"cannot use {workdir} as a workdir: {reason}; give another --workdir"
                )
        # process 0 decides for all, and none continues before config.json is written
        if first_process(refusal is not None) and not refusal:
            refusal = UserError(f"process 0 refuses the workdir {workdir}: see its message")
        if refusal:
            raise refusal
        yield workdir, held


def as_begun(config: ConfigDict, workdir: str | epath.PathLike) -> ConfigDict:
    """The config with which the run in `workdir` is resumed; without a run there, `config`.

    See `common.config.as_begun`. Errors in the directory are reported by `claim`.
    """
    directory = files.path(workdir)
    if not (directory / saved_config.FILE).exists() or not has_trained(directory):
        return config
    try:
        saved = saved_config.read(directory)
    except (OSError, UserError):
        return config  # which `claim` refuses
    if saved.get("method") != config.method:
        return config  # the same
    config, newer = configs.as_begun(config, saved)
    for name, value in sorted(newer.items()):
        logging.warning(
            "the run in %s is older than the field %s: it is resumed as it began, with %s=%s",
            workdir, name, name, value,
        )  # fmt: skip
    return config


def _make(workdir: epath.Path) -> None:
    """Makes the directory; one that holds something else is refused before it is locked."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file: give a new or an empty directory as --workdir")
    names = {p.name for p in workdir.iterdir()} if workdir.is_dir() else set()
    if not names <= OWN_FILES and saved_config.FILE not in names:
        raise UserError(
            f"{workdir} exists, is not empty and holds no run (no config.json): "
            "give a new or an empty directory as --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)


def _claim(workdir: epath.Path, current: dict[str, Any]) -> None:
    names = {p.name for p in workdir.iterdir()}
    if names <= OWN_FILES and not has_trained(workdir):
        # also what is left by a mistake in the config that shows before or in the first step
        saved_config.write(workdir, current)
        logging.info("new run in %s", workdir)
        return
    if saved_config.FILE not in names:
        raise UserError(
            f"{workdir} holds a run whose config.json is missing: restore it from a copy, or give "
            "another --workdir"
        )
    configs.check_same_run(saved_config.read(workdir), current, str(workdir))


def has_trained(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint, or the line of a step."""
    checkpoints, lines = workdir / "checkpoints", workdir / jsonl.FILE
    if checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir()):
        return True
    return lines.exists() and any(record["step"] > 0 for record in jsonl.read(lines))
