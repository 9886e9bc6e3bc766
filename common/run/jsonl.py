"""Files of one JSON object per line, which a resumed run continues."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from common.errors import UserError
from common.run import files

FILE = "metrics.jsonl"
RESULTS = "results.jsonl"  # one line per evaluation
DISCARDED = "metrics.discarded.jsonl"
_MOST_WAITING = 10_000  # lines
_REMOTE_SECONDS = 30.0  # between two rewrites of a file in an object store


def dump(record: Mapping[str, Any]) -> str:
    """Returns one line of strict JSON: numbers that are not finite become null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(clean, allow_nan=False)


def read(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, in order; a half-written line is left out."""
    return list(each(path))


def each(path: str | epath.PathLike) -> Iterator[dict[str, Any]]:
    """`read`, one record at a time: the file is in memory, but not all that is made of it."""
    return (record for _, record in _parse(epath.Path(path)))


def results(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the records of a workdir's `results.jsonl`, in order; [] without one."""
    path = workdir / RESULTS
    return [record for _, record in _records(path)] if path.exists() else []


def append(path: epath.Path, record: Mapping[str, Any]) -> None:
    """Appends one record to a file, on the disk when it returns."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    lines = Lines(path)
    if torn:  # a process died in it; this record must not become a part of it
        lines.add("")
    lines.add(dump(record))
    lines.close()


def discard_after(workdir: epath.Path, step: int) -> None:
    """Moves lines beyond `step` from `metrics.jsonl` to `metrics.discarded.jsonl`.

    Safe at any moment of a crash: the discarded file is complete before the other loses a line,
    both are replaced whole, and lines that a crashed attempt has moved already are not moved
    again. A half-written line (the process died in it) is dropped.

    Args:
        workdir: the directory of both files.
        step: last step to keep.
    """
    path, target = workdir / FILE, workdir / DISCARDED
    if not path.exists():
        return
    parsed = list(_parse(path))
    kept = "".join(line + "\n" for line, record in parsed if record["step"] <= step)
    moved = "".join(line + "\n" for line, record in parsed if record["step"] > step)
    if moved:
        old = target.read_text() if target.exists() else ""
        if not old.endswith(moved):
            files.write_text(target, old + moved)
    if kept != path.read_text():
        files.write_text(path, kept)


def _parse(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return (found for found in _records(path) if isinstance(found[1].get("step"), int))


def _records(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # After a power cut the bytes may not be text.
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield line, record


class Lines:
    """A text file that grows by lines; object stores cannot append, so there it is rewritten.

    While a disk is full or unreachable, lines wait in memory and none is lost; `flush` writes them
    or fails.
    """

    _failing = False

    def __init__(self, path: epath.Path):
        self._path = path
        self._remote = files.is_remote(path)
        self._saved = time.monotonic()
        self._waiting: list[str] = []
        if self._remote:
            self._text = path.read_text() if path.exists() else ""
        else:
            # no buffer: the part of a line left by a failed write is then known, and is cut off
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            self._size = self._file.seek(0, os.SEEK_END)

    def add(self, line: str) -> None:
        """Writes a line, now or, if that is not possible, later.

        Raises:
            UserError: if too many lines are waiting.
        """
        self._waiting.append(line + "\n")
        if self._remote and time.monotonic() - self._saved <= _REMOTE_SECONDS:
            return
        try:
            self._write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                logging.warning("cannot write %s (%s): trying again", self._path, error)
            self._failing = True
            if len(self._waiting) > _MOST_WAITING:
                raise self._lost(error) from error

    def flush(self) -> None:
        """Writes all lines so far to the disk.

        Raises:
            UserError: if that is not possible.
        """
        try:
            self._write()
        except OSError as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """`flush`, and no more lines."""
        try:
            self.flush()
        finally:
            if not self._remote:
                self._file.close()

    def _write(self) -> None:
        text = "".join(self._waiting)
        if self._remote:
            self._path.write_text(self._text + text)
            self._text += text
            self._saved = time.monotonic()
        elif text:
            data = text.encode()
            try:
                written = self._file.write(data)
                if written < len(data):  # the disk is full: writing the rest raises
                    self._file.write(data[written:])
            except OSError:
                os.ftruncate(self._file.fileno(), self._size)
                raise
            self._size += len(data)
        self._waiting.clear()

    def _lost(self, error: OSError) -> UserError:
        reason = error.strerror or error
        return UserError(
            f"cannot write {self._path} ({reason}; {len(self._waiting)} lines wait): make room or "
            "repair the disk; the same command then resumes from the last checkpoint"
        )
