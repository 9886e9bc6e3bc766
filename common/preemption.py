"""SIGTERM, which is what a spot TPU VM gets half a minute before it goes: save this step, leave.

One process keeps a flag of its own. Several must stop at the same step, whichever of them was told:
JAX's preemption service agrees on one a few steps ahead. It sees the signal itself, and a Python
handler would hide it, so there none is installed.
"""

import itertools
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

_asked = itertools.count()
EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class PreemptedError(RuntimeError):
    """The run was told to stop, and its state is saved; the same command carries on."""


class Preemption:
    """Whether this run was told to stop; a context manager for the time of the loop.

    Repeated signals change nothing: the flag is set already, and the save goes on.
    """

    def __init__(self) -> None:
        self._told = False
        self._several = jax.process_count() > 1
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Self:
        # Python refuses handlers elsewhere: a run in a thread of a notebook goes without
        if not self._several and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
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
