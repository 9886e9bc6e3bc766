"""Everything that is said to the person who waits: lines, results, and the progress line."""

import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Mapping
from typing import Literal, TextIO

import jax

# Shown on the line, in this order; the rest is in metrics.jsonl.
SHOWN = ("loss", "contrastive_top1", "agreement", "probe_top1", "knn_top1")
# What a terminal of 80 columns has room for: top1 is that of the contrastive task.
_SHORT = {
    "contrastive_top1": "top1",
    "agreement": "agree",
    "probe_top1": "probe",
    "knn_top1": "kNN",
}
# Scores that are in metrics.jsonl only, since a line would be too long: docs/evaluation.md says why
# the other two figures without labels are those to watch.
_LOGGED_ONLY = tuple(
    f"{name}{end}"
    for name in ("alignment", "rankme", "uniformity")
    for end in ("", "_at_init", "_raw_pixels")
) + ("alignment_ratio_at_init", "view_agreement_at_init")
_PER_CENT = ("top", "view_agreement")  # parts of the names of fractions
_COLUMNS = 80  # of a terminal that does not say
_PLAIN_SECONDS = 10.0  # between lines when nothing can be rewritten (a log file, a notebook)
_TERMINAL_SECONDS = 0.1


def say(text: str, indent: int = 0) -> None:
    """Prints on stderr, on process 0; on a terminal no line breaks inside a word.

    Args:
        text: of one line or more.
        indent: spaces before what does not fit in a line.
    """
    if jax.process_index() == 0:
        print(_encodable(_wrapped(text, indent)), file=sys.stderr, flush=True)


def _wrapped(text: str, indent: int) -> str:
    if not sys.stderr.isatty():
        return text
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        columns = _COLUMNS
    wrap = textwrap.TextWrapper(
        columns - 1, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.fill(line) for line in text.split("\n"))


def result(text: str) -> None:
    """Prints on stdout, on process 0: what a program that calls this one may want to read."""
    if jax.process_index() == 0:
        print(_encodable(text), flush=True)


def _encodable(text: str) -> str:
    r"""Text without the invalid bytes that names of files may have: they become `\udcXX`."""
    return text.encode("utf-8", "backslashreplace").decode()


class Progress:
    """Progress of a run on `stream`.

    On a terminal the cursor waits at the start of the line: what else is written there, such as a
    line of TensorFlow's C++ code, takes the place of the progress instead of running on from it.

    Args:
        total_steps: updates in the whole run.
        stream: None is stderr, False is silence.
    """

    def __init__(self, total_steps: int, stream: TextIO | Literal[False] | None = None):
        self._stream: TextIO | None = (sys.stderr if stream is None else stream) or None
        self._total = total_steps
        self._terminal = bool(self._stream and self._stream.isatty())
        self._last = -math.inf
        self._width = 0  # of what stands on the current terminal line
        self._handlers = logging.getLogger().handlers[:] if self._terminal else []
        for handler in self._handlers:
            handler.addFilter(self._make_way)

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
        rate, waiting = timing.get("images_per_second"), 0.0
        if rate:
            parts.append(f"{rate:,.0f} images/s")
            waiting = timing["seconds_input"] / max(timing["seconds_step"], 1e-9)
        parts += [f"ETA {duration(eta)}"] if eta is not None and step < self._total else []
        parts += [f"input {waiting:.0%}"] if waiting > 0.1 else []  # a warning
        short = _SHORT if self._terminal else {}
        parts += [describe(n, values[n], short.get(n)) for n in SHOWN if n in values]
        parts += [] if epoch is None else [f"epoch {epoch:.1f}"]
        if self._terminal:
            parts = _that_fit(parts, self._columns() - 1)  # a line that wraps cannot be rewritten
        self._print("  ".join(parts), stay=not self._terminal)

    def message(self, step: int, values: Mapping[str, float]) -> None:
        """Prints a line that stays: the result of an evaluation."""
        if self._stream:
            shown = {n: x for n, x in values.items() if n not in _LOGGED_ONLY}
            parts = [f"step {step}", *(describe(name, value) for name, value in shown.items())]
            columns = self._columns() - 1 if self._terminal else math.inf
            while parts:  # nothing breaks inside a word
                line = _that_fit(parts, columns)
                self._print("  ".join(line), stay=True)
                parts = parts[len(line) :]

    def close(self) -> None:
        """Leaves the last line standing."""
        for handler in self._handlers:
            handler.removeFilter(self._make_way)
        self._handlers = []
        if self._width:
            print(file=self._stream, flush=True)
            self._width = 0

    def _columns(self) -> int:
        try:
            stream = self._stream or sys.stderr
            return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
        except (OSError, ValueError, AttributeError):
            return _COLUMNS

    def _make_way(self, record: logging.LogRecord) -> bool:
        """Clears the line before Python's `logging` writes one."""
        if self._width:
            print("\r" + " " * self._width, end="\r", file=self._stream, flush=True)
            self._width = 0
        return True

    def _print(self, text: str, stay: bool) -> None:
        if self._terminal:
            end = "\n" if stay else "\r"
            print("\r" + text.ljust(self._width), end=end, file=self._stream, flush=True)
            self._width = 0 if stay else len(text)
        else:
            print(text, file=self._stream, flush=True)


def _that_fit(parts: list[str], columns: float) -> list[str]:
    """The first of `parts` that fit in a line, at least one."""
    while len(parts) > 1 and len("  ".join(parts)) > columns:
        parts = parts[:-1]
    return parts


def describe(name: str, value: float, label: str | None = None) -> str:
    """Returns e.g. "loss 4.812"; a fraction of right answers becomes "top1 41.2 %".

    Args:
        name: of the scalar.
        value: of it.
        label: to show instead of the name.
    """
    label = label or name
    if any(part in name for part in _PER_CENT):
        return f"{label} {100 * value:.1f} %"
    return f"{label} {value:.3f}" if isinstance(value, float) else f"{label} {value}"


def duration(seconds: float) -> str:
    """Returns 3:12 or 1:02:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
