"""The line that a person watches: one that rewrites itself on a terminal, plain ones elsewhere."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

# Shown on the line, in this order; the rest is in metrics.jsonl.
SHOWN = ("loss", "contrastive_top1", "probe_top1", "knn_top1")
_PLAIN_SECONDS = 10.0  # between lines when nothing can be rewritten (a log file, a notebook)
_TERMINAL_SECONDS = 0.1


class Progress:
    """Progress of a run on `stream`.

    Args:
        total_steps: updates in the whole run.
        stream: None is stderr, False is silence.
    """

    def __init__(self, total_steps: int, stream: TextIO | bool | None = None):
        self._stream = sys.stderr if stream is None else stream or None
        self._total = total_steps
        self._terminal = bool(self._stream and self._stream.isatty())
        self._last = -math.inf
        self._width = 0  # of what stands on the current terminal line

    def show(
        self,
        step: int,
        epoch: float | None,
        values: Mapping[str, float],
        timing: Mapping[str, float],
        eta: float | None,
    ) -> None:
        """Shows a training step, unless the last line is too recent; the last step always shows.

        Args:
            step, epoch: how far the run is.
            values: scalars of the step.
            timing: of `metrics.TIMING_KEYS`, those known.
            eta: seconds to the end, None if not known yet.
        """
        now = time.monotonic()
        interval = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
        if not self._stream or (now - self._last < interval and step < self._total):
            return
        self._last = now
        parts = [f"step {step}/{self._total}"]
        parts += [] if epoch is None else [f"epoch {epoch:.1f}"]
        parts += [describe(name, values[name]) for name in SHOWN if name in values]
        if rate := timing.get("images_per_second"):
            parts.append(f"{rate:,.0f} images/s")
            waiting = timing["seconds_input"] / max(timing["seconds_step"], 1e-9)
            parts += [f"input {waiting:.0%}"] if waiting > 0.1 else []
        parts += [f"ETA {duration(eta)}"] if eta is not None and step < self._total else []
        self._print("  ".join(parts), stay=not self._terminal)

    def message(self, step: int, values: Mapping[str, float]) -> None:
        """Prints a line that stays: the result of an evaluation."""
        if self._stream:
            text = "  ".join(describe(name, value) for name, value in values.items())
            self._print(f"step {step}  {text}", stay=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _print(self, text: str, stay: bool) -> None:
        if self._terminal:
            # A line that wraps cannot be rewritten.
            text = text[: shutil.get_terminal_size().columns - 1] if not stay else text
            print("\r" + text.ljust(self._width), end="", file=self._stream, flush=True)
            self._width = len(text)
        else:
            print(text, end="", file=self._stream)
        if stay:
            print(file=self._stream, flush=True)
            self._width = 0


def describe(name: str, value: float) -> str:
    """Returns e.g. "loss 4.812"; a fraction whose name says top-k becomes "top1 41.2 %"."""
    if "top" in name:
        return f"{name} {100 * value:.1f} %"
    return f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"


def duration(seconds: float) -> str:
    """Returns 3:12 or 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
