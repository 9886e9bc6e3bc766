"""What a run reports: `metrics.jsonl`, copies of it, and a line on the terminal.

Only process 0 writes. Scalars are logged one call late, so that nothing here waits for the device
while it has no further work.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TextIO

import jax
import numpy as np
from etils import epath

from common.run import events, jsonl
from common.run.console import Progress
from common.run.jsonl import FILE

# Fields that differ between two runs of the same computation: seconds a step since the last line,
# how much of that the loop waited for data, and seconds of evaluations and checkpoints beside it.
TIMING_KEYS = ("time", "images_per_second", "seconds_step", "seconds_input", "seconds_pause")


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the message names the step."""


class Copy(Protocol):
    """What gets every record beside `metrics.jsonl`; no failure of its own reaches the caller."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a record, with "step" and "time"."""
        ...

    def flush(self) -> None:
        """Called when `metrics.jsonl` is on the disk, at scores and checkpoints."""
        ...

    def close(self) -> None:
        """Called when `metrics.jsonl` is closed."""
        ...


class MetricsWriter:
    """Writes scalars by step, and continues the files of an interrupted run.

    Use it as a context manager. A step is the number of updates done. Every process makes one and
    calls it alike (so that all of them stop at a bad loss); only process 0 writes.

    Args:
        workdir: directory of the run, local or e.g. `gs://...`.
        start_step: the step restored; 0 for a run from scratch. Lines of later steps (at 0: all)
            move to `metrics.discarded.jsonl`, because the run is about to write them again.
        total_steps: updates in the whole run.
        images_per_step: the global batch size.
        steps_per_epoch: updates in an epoch; None leaves the epoch out.
        log_every: interval that `due` goes by.
        tensorboard: also write `<workdir>/tensorboard`.
        stream: where progress goes; None is stderr.
        extra: called when a step is logged, for more scalars of it.
        stop_at_nonfinite: whether a loss that is not finite is an error.
        copies: get the same records, on process 0.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        start_step: int,
        total_steps: int,
        images_per_step: int,
        steps_per_epoch: int | None = None,
        log_every: int = 1,
        tensorboard: bool = True,
        stream: TextIO | None = None,
        extra: Callable[[], Mapping[str, float]] = dict,
        stop_at_nonfinite: bool = True,
        copies: Sequence[Copy] = (),
    ):
        self._start, self._total = start_step, total_steps
        self._images_per_step = images_per_step
        self._steps_per_epoch = steps_per_epoch
        self._log_every = max(1, log_every)
        self._extra, self._stop = extra, stop_at_nonfinite
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        # Time and step of the last scalars that the device delivered, less the pauses since.
        self._mark: tuple[float, int] | None = None
        self._first: tuple[float, int] | None = None  # the same, after the step that compiles
        self._paused = 0.0
        self._waited = 0.0  # for data, in the same time
        self._trained = [0.0, 0]  # seconds, steps: pauses and compilation left out
        self._lines = self._events = None
        self._copies = [*copies] if jax.process_index() == 0 else []
        self._progress = Progress(total_steps, stream if jax.process_index() == 0 else False)
        if jax.process_index() == 0:
            workdir = epath.Path(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
            jsonl.discard_after(workdir, start_step if start_step > 0 else -1)
            self._lines = jsonl.Lines(workdir / FILE)
            if tensorboard:
                try:
                    self._events = events.open_writer(workdir / "tensorboard", start_step)
                except OSError as error:
                    logging.warning("training without TensorBoard: %s", error)
            if start_step:
                self._sync()  # what was discarded leaves the copies too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # When something else went wrong already, that is the error to show.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.close()

    @property
    def images_per_second(self) -> float | None:
        """Training throughput so far, without the first step, evaluation or checkpoints."""
        seconds, steps = self._trained
        return steps * self._images_per_step / seconds if seconds > 0 else None

    def due(self, step: int) -> bool:
        """Whether to log this step: each `log_every`, the first of this start, and the last.

        The first matters because the clock of images/s starts when its scalars arrive.
        """
        return step % self._log_every == 0 or step in (self._start + 1, self._total)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Takes the scalars of a training step; `flush` after the next step logs them.

        Args:
            step: updates done.
            scalars: device arrays of shape (), or numbers. Accuracies are fractions in [0, 1].

        Raises:
            NonFiniteLossError: if a loss of the *previous* call was not finite.
        """
        self.flush()
        self._pending = (step, dict(scalars))

    def write_now(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs the result of an evaluation, as a line of its own, after all steps before it."""
        self.flush()
        values = _numbers(scalars)
        self._record(step, values)
        self._sync()  # a checkpoint of this step may follow, and the line is not written again
        self._progress.message(step, values)

    def flush(self) -> None:
        """Logs what `write` still holds; waits for the device.

        Raises:
            NonFiniteLossError: if its loss is not finite. The line is written before.
        """
        if self._pending is None:
            return
        (step, scalars), self._pending = self._pending, None
        values = _numbers(scalars) | dict(self._extra())
        now = time.perf_counter()
        timing = {}
        if self._mark is not None and step > self._mark[1]:
            seconds, steps = now - self._mark[0] - self._paused, step - self._mark[1]
            rate = steps * self._images_per_step / max(seconds, 1e-9)
            timing = {
                "images_per_second": round(rate, 2),
                "seconds_step": round(seconds / steps, 4),
                "seconds_input": round(self._waited / steps, 4),
                "seconds_pause": round(self._paused, 2),
            }
            self._trained = [self._trained[0] + seconds, self._trained[1] + steps]
        self._mark, self._paused, self._waited = (now, step), 0.0, 0.0
        self._first = self._first or self._mark
        if step % self._log_every == 0 or step in (1, self._total):
            # the first step of a resumed run only starts the clock: its line would be extra
            self._record(step, values, timing)
        eta = None
        if step > self._first[1]:
            # With the pauses, because the rest of the run will have them too.
            eta = (now - self._first[0]) / (step - self._first[1]) * (self._total - step)
        self._progress.show(step, self._epoch(step), values, timing, eta)
        bad = [name for name in values if _is_loss(name) and not math.isfinite(values[name])]
        if bad and self._stop:
            raise NonFiniteLossError(
                f"{bad[0]} is {values[bad[0]]} at step {step}: the run stops, and the last good "
                "checkpoint stays; try a smaller learning rate, a longer warm-up or clip_norm"
            )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self, wait_for: Any = None) -> Iterator[None]:
        """Takes an evaluation or a checkpoint out of images/s.

        Args:
            wait_for: arrays of the last step (say, the state). Training that still runs when the
                pause starts would count as pause; this waits for it first.
        """
        self.flush()
        self._sync()  # a checkpoint may follow, and a resumed run keeps what is before it
        if wait_for is not None:
            jax.block_until_ready(wait_for)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def _sync(self) -> None:
        """Makes everything so far outlive this process."""
        if self._lines:
            self._lines.flush()
        if self._events:
            self._events.flush()
        for copy in self._copies:
            copy.flush()

    def close(self) -> None:
        """Logs what is left and closes the files."""
        try:
            self.flush()
        finally:
            self._progress.close()
            if self._lines:
                self._lines.close()
            if self._events:
                self._events.close()
            for copy in self._copies:
                copy.close()
            self._lines, self._events, self._copies = None, None, []

    def _epoch(self, step: int) -> float | None:
        return round(step / self._steps_per_epoch, 4) if self._steps_per_epoch else None

    def _record(
        self, step: int, values: Mapping[str, float], timing: Mapping[str, float] | None = None
    ) -> None:
        if self._lines is None:
            return
        extra = {"epoch": self._epoch(step)} if self._steps_per_epoch else {}
        timing = {**(timing or {}), "time": round(time.time(), 3)}
        record = {"step": step, **extra, **values, **timing}
        self._lines.add(jsonl.dump(record))
        for copy in self._copies:
            copy.add(record)
        if self._events:
            for name, value in {**values, **timing}.items():
                if name != "time" and math.isfinite(value):
                    self._events.add_scalar(name, value, step)


def _numbers(scalars: Mapping[str, Any]) -> dict[str, float]:
    """One transfer for all; arrays that every process holds whole."""
    return {name: np.asarray(x).item() for name, x in jax.device_get(dict(scalars)).items()}


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith(("_loss", "/loss"))
