"""Ctrl-C in `main.py`, but for the first one in a training loop (`common/train/preemption.py`)."""

import os
import signal
from types import FrameType


def install() -> None:
    """From now on Ctrl-C ends the process at once, with one line and status 130.

    Threads of the input pipeline, and a checkpoint that is being written, are not waited for: what
    is on the disk is whole without them. A signal that is ignored, as under nohup, stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)
