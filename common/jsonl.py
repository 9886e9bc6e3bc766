"""Files of one JSON object a line, which a run may stop writing and later take up again."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from common import files

FILE = "metrics.jsonl"
DISCARDED = "metrics.discarded.jsonl"
_REMOTE_SECONDS = 30.0  # between two rewrites of a file in an object store


def dump(record: Mapping[str, Any]) -> str:
    """Returns one line of strict JSON: what is not finite becomes null."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(clean, allow_nan=False)


def read(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, in order; a half-written line is left out."""
    return [record for _, record in _parse(epath.Path(path))]


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
    parsed = _parse(path)
    kept = "".join(line + "\n" for line, record in parsed if record["step"] <= step)
    moved = "".join(line + "\n" for line, record in parsed if record["step"] > step)
    if moved:
        old = target.read_text() if target.exists() else ""
        if not old.endswith(moved):
            files.write_text(target, old + moved)
    if kept != path.read_text():
        files.write_text(path, kept)


def _parse(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    out = []
    # Bytes that a power cut left behind need not be text.
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                out.append((line, record))
    return out


class Lines:
    """A text file that grows by lines; object stores cannot append, so there it is rewritten."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._remote = files.is_remote(path)
        self._saved = time.monotonic()
        if self._remote:
            self._text = path.read_text() if path.exists() else ""
        else:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, line: str) -> None:
        if not self._remote:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._text += line + "\n"
        if time.monotonic() - self._saved > _REMOTE_SECONDS:
            self._save()

    def flush(self) -> None:
        """Makes every line so far outlive this process."""
        if self._remote:
            self._save()

    def close(self) -> None:
        self._save() if self._remote else self._file.close()

    def _save(self) -> None:
        self._path.write_text(self._text)
        self._saved = time.monotonic()
