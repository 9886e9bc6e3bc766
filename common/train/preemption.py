"""SIGTERM, which is what a spot TPU VM gets half a minute before it goes: save this step, leave.

Ctrl-C (SIGINT) does the same; a second one leaves at once.

One process keeps a flag of its own. Several must stop at the same step, whichever of them was told:
JAX's preemption service agrees on one a few steps ahead. It sees SIGTERM itself, and a Python
handler would hide it, so there none is installed; SIGINT is passed on to it as SIGTERM.
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

_asked = itertools.count()
# Seconds for which a second SIGINT is the first one: a terminal sends it to all processes, and
# `common.distributed` passes it on to those that it has started.
_ONE_INTERRUPT = 1.0


class PreemptedError(RuntimeError):
    """The run was told to stop, and its state is saved; the same command carries on.

    Attributes:
        exit_status: as a shell reports of a process that the signal ended.
    """

    def __init__(self, text: str, number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.exit_status = 128 + number


class Preemption:
    """Whether this run was told to stop; a context manager for the time of the loop.

    Repeated SIGTERM changes nothing: the flag is set already, and the save goes on. A second SIGINT
    does what a first one did before: it ends `main.py`, and is a `KeyboardInterrupt` elsewhere.

    Attributes:
        number: of the signal by which the run was told.
    """

    def __init__(self) -> None:
        self.number = signal.SIGTERM
        self._told = False
        self._interrupted = 0.0  # when
        self._several = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python refuses handlers elsewhere: a run in a thread of a notebook goes without
        if threading.current_thread() is threading.main_thread():
            if not self._several:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            if callable(signal.getsignal(signal.SIGINT)):  # not where it is ignored, as under nohup
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        if self._several:
            logging.getLogger("absl").addFilter(_is_news)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("absl").removeFilter(_is_news)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted:
            if now - self._interrupted > _ONE_INTERRUPT:
                self._before[signal.SIGINT](number, frame)
            return
        self._interrupted, self.number = now, signal.SIGINT
        # past Python's buffers, in which this thread may be just now
        os.write(2, b"\nSaving this step, then leaving; Ctrl-C again leaves at once.\n")
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._told = True

    def after(self) -> bool:
        """Whether all processes are to save and leave now.

        Every process asks after every dispatch. JAX agrees on a number of such questions, which are
        counted over the life of the process: a second run in it must not meet the point of the
        first again.
        """
        if self._several:
            return multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._told


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax warns that processes agree to stop, several times, when that is what was asked."""
    return "Reached preemption sync point" not in record.getMessage()
