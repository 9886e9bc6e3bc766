"""`config.profile="100:105"`: a trace of those steps, for TensorBoard's profile page (xprof)."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from etils import epath

from common.errors import UserError
from common.run import files


class Profile:
    """Traces a range of steps on process 0 into `<workdir>/tensorboard/plugins/profile`.

    Args:
        span: "FIRST:LAST", both included, counted from 1; "" traces nothing.
        workdir: of the run.

    Raises:
        UserError: if `span` has another form.
    """

    def __init__(self, span: str, workdir: epath.Path) -> None:
        match = re.fullmatch(r"(\d+):(\d+)", span or "0:0")
        if not match or (span and not 1 <= int(match[1]) <= int(match[2])):
            raise UserError(f'profile="{span}": write FIRST:LAST, two steps, e.g. "100:105"')
        self._first, self._last = int(match[1]), int(match[2])
        self._target = workdir / "tensorboard"
        self._directory = ""  # where the profiler writes; set while it runs

    def edge(self, step: int) -> bool:
        """Whether a dispatch must end after this step, so that the trace holds only its steps."""
        return step in (self._first - 1, self._last)

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """A context for the dispatch of a step; starts the trace before its first step."""
        if step == self._first and jax.process_index() == 0:
            # the profiler writes its files itself, and to local disks only
            remote = files.is_remote(self._target)
            self._directory = tempfile.mkdtemp() if remote else os.fspath(self._target)
            jax.profiler.start_trace(self._directory)
        if not self._directory:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, once `state` is computed."""
        if self._directory and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace; also called when a run stops in the middle of it."""
        if not self._directory:
            return
        local, self._directory = pathlib.Path(self._directory), ""
        jax.profiler.stop_trace()
        if files.is_remote(self._target):
            for path in (p for p in local.rglob("*") if p.is_file()):
                target = self._target / path.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            shutil.rmtree(local)
