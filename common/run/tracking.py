"""Weights & Biases, for those who keep their runs there: `log.wandb=PROJECT`.

W&B's own environment variables decide all else: WANDB_ENTITY, WANDB_MODE=offline, WANDB_DIR,
WANDB_NAME, WANDB_TAGS and so on.

Every call to `wandb` is made in a thread, which training never waits for: a service that does not
answer costs a warning and what it would have shown. `metrics.jsonl` has the same numbers.
"""

import io
import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
from etils import epath
from ml_collections import ConfigDict

from common import config as configs
from common.errors import UserError, first_line
from common.run import files

FILE = "wandb.json"  # the id of the run at W&B, by which a resumed run goes on with it
_MOST_WAITING = 10_000  # calls
_END_SECONDS = 45.0  # that a finished run waits for uploads
# Where the user has not set them. W&B would wait for ever for uploads, or for someone to log in.
_PATIENCE = {
    "WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "40", "WANDB_LOGIN_TIMEOUT": "5",
}  # fmt: skip


def check(project: str) -> None:
    """Imports `wandb` if there is a project to write to.

    Raises:
        UserError: if it is not installed.
    """
    if project and _installed() is None:
        raise UserError(
            f"log.wandb={project} needs a package that is missing: pip install wandb, or leave "
            "the field empty"
        )


def _installed() -> Any:
    """The package, or None."""
    try:
        import wandb
    except ImportError:
        return None
    # without the package, the directory ./wandb that it has left is taken for a module
    return wandb if hasattr(wandb, "init") else None


class Tracker:
    """A run at W&B; without `log.wandb`, and on all processes but the first, it does nothing.

    Use it as a context manager. The run is opened by the first record, and continued if the
    workdir was one of W&B before. Records have their own "step" as x axis, because those that a
    resumed run writes again would be refused as steps of W&B, which only grow.

    Args:
        config: of the run, which becomes the config at W&B.
        workdir: of the run.
    """

    def __init__(self, config: ConfigDict, workdir: epath.Path) -> None:
        self._config, self._workdir = config, workdir
        self._on = bool(config.log.wandb) and jax.process_index() == 0
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._exit_code = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits for uploads, for a while."""
        if self._thread is None:
            return
        self._exit_code = int(kind is not None)
        self._put(None)
        self._thread.join(_END_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"no answer in {_END_SECONDS:g} s")

    def add(self, record: Mapping[str, Any]) -> None:
        """Logs a record of `metrics.jsonl`."""
        values = {name: value for name, value in record.items() if name != "time"}
        self._put(lambda run: run.log(values))

    def flush(self) -> None:
        """Nothing: W&B sends by itself."""

    def close(self) -> None:
        """Nothing: the summary is still to come."""

    def finish(self, summary: Mapping[str, Any], pictures: Iterable[epath.Path]) -> None:
        """Adds what a run has when it is done.

        Args:
            summary: of `summary.json`.
            pictures: PNGs; those that do not exist are left out.
        """

        def send(run: Any) -> None:
            run.summary.update({name: x for name, x in summary.items() if x is not None})
            if shown := {path.stem: _image(path) for path in pictures if path.exists()}:
                run.log(shown)

        self._put(send)

    def _put(self, call: Callable[[Any], None] | None) -> None:
        if not self._on:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up("it does not keep up")

    def _work(self) -> None:
        try:
            run = self._open()
            for call in iter(self._calls.get, None):
                call(run)
            run.finish(exit_code=self._exit_code)
        except BaseException as error:  # a thread has nobody else to tell
            self._give_up(first_line(error))

    def _give_up(self, reason: str) -> None:
        if self._on:
            logging.warning(
                "W&B gets nothing more of this run (%s): training does not need it, and "
                "metrics.jsonl has the same numbers; WANDB_MODE=offline needs no network", reason,
            )  # fmt: skip
        self._on = False

    def _open(self) -> Any:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        project = self._config.log.wandb
        run = _installed().init(
            project=project,
            id=os.environ.get("WANDB_RUN_ID") or _id(self._workdir / FILE, project),
            name=os.environ.get("WANDB_NAME") or self._workdir.name,
            config=configs.as_dict(self._config),
            resume="allow",
            allow_val_change=True,
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def _id(path: epath.Path, project: str) -> str:
    """The id in a file; a new one, which the file then holds, if that is of no such project."""
    try:
        saved = json.loads(path.read_text())
        if saved["project"] == project:
            return str(saved["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or torn
    new = uuid.uuid4().hex[:8]
    files.write_text(path, json.dumps({"project": project, "id": new}) + "\n")
    return new


def _image(path: epath.Path) -> Any:
    from PIL import Image

    return _installed().Image(Image.open(io.BytesIO(path.read_bytes())))
