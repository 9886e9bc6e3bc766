"""`config.profile="100:105"`: a trace of those steps, for TensorBoard's profile page (xprof)."""

import contextlib
import os
import re
from typing import Any

import jax
from etils import epath

from common.errors import UserError


class Profile:
    """Traces some steps on process 0 into `<workdir>/tensorboard/plugins/profile`.

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
        self._directory = os.fspath(workdir / "tensorboard")
        self._running = False

    def edge(self, step: int) -> bool:
        """Whether a dispatch must end after this step, so that the trace holds just its steps."""
        return step in (self._first - 1, self._last)

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of a step; starts the trace where it is due."""
        if step == self._first and jax.process_index() == 0:
            jax.profiler.start_trace(self._directory)
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace after its last step, when `state` is there."""
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, also of a run that stops inside it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
