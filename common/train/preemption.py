"""SIGTERM, which a spot TPU VM gets half a minute before it is reclaimed: save this step and exit.

Ctrl-C (SIGINT) does the same; a second one exits at once.

A run of one process has its own flag. The processes of a larger run must stop at the same step,
whichever of them got the signal: JAX's preemption service agrees on a step a little ahead. It
handles SIGTERM itself, and a Python handler would replace its own, so none is installed there;
SIGINT is forwarded to it as SIGTERM.
"""

import itertools
import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

_queries = itertools.count()
# Seconds within which two SIGINTs count as one: a terminal sends it to all processes, and
# `common.distributed` forwards it to those that it has started.
_ONE_INTERRUPT = 1.0


class PreemptedError(RuntimeError):
    """A signal stopped the run, and its state is saved; the same command continues it.

    Attributes:
        exit_status: what a shell reports for a process that the signal ended.
    """

    def __init__(self, text: str, number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.exit_status = 128 + number


class Preemption:
    """Whether a signal asked this run to stop; a context manager around the loop.

    A repeated SIGTERM changes nothing: the flag is set, and saving continues. A second SIGINT does
    what a first one did before the loop: it ends `main.py`, and is a `KeyboardInterrupt` elsewhere.

    Attributes:
        number: the signal.
    """

    def __init__(self) -> None:
        self.number = signal.SIGTERM
        self._stopping = False
        self._interrupted = 0.0  # time of the first SIGINT
        self._multiprocess = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only: a run in a notebook's thread has none
        if threading.current_thread() is threading.main_thread():
            if not self._multiprocess:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if callable(signal.getsignal(signal.SIGINT)):  # not where it is ignored, as under nohup
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if self._multiprocess:
            logging.getLogger("absl").addFilter(_not_about_stopping)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("absl").removeFilter(_not_about_stopping)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted:
            if now - self._interrupted > _ONE_INTERRUPT:
                self._before[signal.SIGINT](number, frame)
            return
        self._interrupted, self.number = now, signal.SIGINT
        # not through Python's buffers, which this thread may be writing to at this moment
        os.write(2, b"\nSaving this step, then leaving; Ctrl-C again leaves at once.\n")
        if self._multiprocess:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._stopping = True

    def after(self) -> bool:
        """Whether all processes are to save and exit now.

        Every process asks after every dispatch. JAX agrees on a count of such calls, over the life
        of the process: a second run in it must not reach the count of the first again.
        """
        if self._multiprocess:
            return multihost_utils.reached_preemption_sync_point(next(_queries))
        return self._stopping


def _not_about_stopping(record: logging.LogRecord) -> bool:
    """False for Orbax's repeated warnings that the processes have agreed to stop."""
    return "Reached preemption sync point" not in record.getMessage()
