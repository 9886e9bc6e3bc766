"""Ctrl-C in `main.py`, except the first in a training loop (`common/train/preemption.py`)."""

import os
import signal
from types import FrameType


def install() -> None:
    """Makes Ctrl-C end the process at once, with one line and status 130.

    It does not wait for threads of the input pipeline or for a checkpoint that is being written:
    the files on the disk are complete without them. An ignored signal (nohup) stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)
