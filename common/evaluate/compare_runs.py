"""Finds and reads the runs of `--mode=compare`, also while they train."""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from common import config as configs
from common.errors import UserError
from common.optim import steps_of
from common.run import files, jsonl, saved_config

_MAGIC = "*?["  # what makes a pattern of a path


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says of its run so far.

    Attributes:
        name: in tables and pictures.
        config: every field of `config.json` by its full name.
        records: of `metrics.jsonl`.
        summary: of `summary.json`; {} until the run has ended.
    """

    name: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def method(self) -> str:
        """The name of its method; "" without a config."""
        return self.config.get("method", "")

    @property
    def step(self) -> int:
        """Updates done."""
        return self.records[-1]["step"] if self.records else 0

    @functools.cached_property
    def total(self) -> int | None:
        """Updates in the whole run; None where that does not show yet."""
        if "steps" in self.summary:
            return self.summary["steps"]
        # an epoch in steps, from the last line: its epoch is rounded, so the later the better
        known = [r for r in self.records if r.get("epoch") and r["step"]]
        per_epoch = round(known[-1]["step"] / known[-1]["epoch"]) if known else 0
        try:
            return steps_of(self.config.get("duration", 0), per_epoch) or None
        except UserError:
            return None

    def last(self, key: str) -> float | None:
        """The newest value of a scalar."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)

    def first(self, key: str) -> float | None:
        """The oldest value of a scalar."""
        return next((r[key] for r in self.records if r.get(key) is not None), None)

    @property
    def images_per_second(self) -> float | None:
        """Without compilation, scores and checkpoints."""
        if rate := self.summary.get("images_per_second"):
            return rate
        rates = [r["images_per_second"] for r in self.records if r.get("images_per_second")]
        return statistics.median(rates) if rates else None

    @property
    def seconds(self) -> float | None:
        """Of training, scores and checkpoints, over all its starts."""
        if seconds := self.summary.get("seconds"):
            return seconds
        total, before = 0.0, 0
        for record in self.records:
            if record.get("seconds_step") is not None:
                total += record["seconds_step"] * (record["step"] - before)
                total += record.get("seconds_pause") or 0.0
            before = record["step"]
        return total or None


def find(texts: Sequence[str]) -> tuple[list[Run], int]:
    """The runs of `--workdirs`, in its order, each once.

    Args:
        texts: a directory, a pattern such as "runs/*", or NAME=DIRECTORY, each.

    Returns:
        The runs, and how many directories that fit a pattern hold none.

    Raises:
        UserError: a directory that does not exist or holds no run, a pattern that no run fits.
    """
    found: dict[str, tuple[str, epath.Path]] = {}
    skipped = 0
    for text in texts:
        name, path = _named(text)
        paths = _matching(text) if _is_pattern(path) else [path]
        holding = [p for p in paths if _holds_run(p) and not (_is_pattern(path) and _broken(p))]
        if not holding and _is_pattern(path):
            raise UserError(
                f"--workdirs={text}: no directory that fits this pattern holds a run "
                f"({len(paths)} fit it): give workdirs of runs, e.g. --workdirs='runs/*'"
            )
        if not path.is_dir() and not _is_pattern(path):
            raise UserError(
                f"--workdirs: there is no directory {path}: give workdirs of runs, separated by "
                "commas"
            )
        if not holding:
            raise UserError(
                f"--workdirs: {path} holds no run (no config.json, no metrics.jsonl); for the runs "
                f"inside of it write --workdirs='{path}/*'"
            )
        skipped += len(paths) - len(holding)
        for p in holding:
            found.setdefault(str(p), (name, p))
    names = short([path for _, path in found.values()])
    runs = [
        _read(name or other, path)
        for (name, path), other in zip(found.values(), names, strict=True)
    ]
    return runs, skipped


def _named(text: str) -> tuple[str, epath.Path]:
    """The parts of NAME=DIRECTORY; the name is "" of a path, which may have a "=" in it."""
    name, equals, rest = text.partition("=")
    path = files.path(text.rstrip("/") or "/")
    if equals and not _is_pattern(path) and "/" not in name and not path.exists():
        return name, files.path(rest.rstrip("/") or "/")
    return "", path


def _is_pattern(path: epath.Path) -> bool:
    return any(sign in str(path) for sign in _MAGIC) and not path.exists()


def _matching(pattern: str) -> list[epath.Path]:
    """The directories that fit a pattern, sorted."""
    parts = str(files.path(pattern.rstrip("/"))).split("/")
    plain = next(i for i, part in enumerate(parts) if any(sign in part for sign in _MAGIC))
    base = epath.Path("/".join(parts[:plain]) or ("/" if parts[0] == "" else "."))
    return sorted(path for path in base.glob("/".join(parts[plain:])) if path.is_dir())


def _holds_run(path: epath.Path) -> bool:
    return (path / saved_config.FILE).exists() or (path / jsonl.FILE).exists()


def _broken(path: epath.Path) -> bool:
    """Whether a run's config cannot be read; says why."""
    if not (path / saved_config.FILE).exists():
        return False
    try:
        saved_config.read(path)
    except UserError as error:
        # `console` asks for this process's index, and so takes the devices
        print(f"left out: {error}", file=sys.stderr)
        return True
    return False


def short(paths: Sequence[epath.Path]) -> list[str]:
    """The shortest names that tell paths apart: without an end that all share, and a beginning.

    Args:
        paths: no two alike.
    """
    parts = [str(path).rstrip("/").split("/") for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    for kept in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-kept:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(name: str, path: epath.Path) -> Run:
    has_config, has_lines = (path / saved_config.FILE).exists(), (path / jsonl.FILE).exists()
    try:
        summary = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):  # none yet, or torn
        summary = {}
    return Run(
        name,
        configs.flatten(saved_config.read(path)) if has_config else {},
        jsonl.read(path / jsonl.FILE) if has_lines else [],
        summary if isinstance(summary, dict) else {},
    )
