"""The tables of `--mode=compare`: how far and how good each run is, and what sets it apart."""

import collections
import csv
import io
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import config as configs
from common.evaluate.compare_runs import Run
from common.run import console

COLUMNS = 80  # of the terminal
_GAP = "  "
_SHORTEST = 12  # columns that the name of a run has at least
# Fields that say what is written, and how often: not of interest here.
_OUTPUT = ("log.", "log_every", "checkpoint.", "evaluate.pictures", "profile")
# Scalars that not every run has: their column appears if one of the runs has a value.
_OPTIONAL = {"view_agreement": "agree", "rankme": "RankMe"}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _done(run: Run) -> str:
    return f"{100 * run.step / run.total:.0f} %" if run.total else ""


# What a person reads of a run, by heading; kNN in percent.
_SHOWN: dict[str, Callable[[Run], str]] = {
    "run": lambda run: run.name,
    "method": lambda run: run.method,
    "done": _done,
    "epoch": lambda run: "" if run.last("epoch") is None else f"{run.last('epoch'):.1f}",
    "loss": lambda run: _number(run.last("loss")),
    "kNN %": lambda run: _percent(run.last("knn_top1")),
    "start": lambda run: _percent(run.first("knn_top1")),
    "images/s": lambda run: f"{run.images_per_second:,.0f}" if run.images_per_second else "",
    "time": lambda run: console.duration(run.seconds) if run.seconds else "",
}
# The same for programs.
_EXACT: dict[str, Callable[[Run], Any]] = {
    "run": lambda run: run.name,
    "method": lambda run: run.method,
    "step": lambda run: run.step,
    "total_steps": lambda run: run.total,
    "epoch": lambda run: run.last("epoch"),
    "loss": lambda run: run.last("loss"),
    "knn_top1": lambda run: run.last("knn_top1"),
    "knn_top1_at_start": lambda run: run.first("knn_top1"),
    "images_per_second": lambda run: run.images_per_second,
    "seconds": lambda run: run.seconds,
}


def differing(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """The fields of the configs that are not alike in all runs, with the value in each.

    A field of a method is compared among the runs of that method; the others have None there. One
    that a run is older than has the value of what the code did then.
    """
    sections = {run.method for run in runs if run.method}
    found = {}
    every = {name: value for run in reversed(runs) for name, value in run.config.items()}
    for name in sorted(n for n in every if not n.startswith(_OUTPUT)):
        section = name.partition(".")[0]
        having = [run for run in runs if run.config]
        if section in sections and "." in name:
            having = [run for run in runs if run.method == section]
        off = None if every[name] is None else type(every[name])()  # 0, False or ""
        before = configs.BEFORE.get(name, off)
        values = {id(run): _shown_value(run.config.get(name, before)) for run in having}
        # "2 epochs" is "2epochs"
        if len({value.replace(" ", "") for value in values.values()}) > 1:
            found[name] = [values.get(id(run)) for run in runs]
    return found


def _shown_value(value: Any) -> str:
    """A value as on a command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def text(runs: Sequence[Run], fields: Mapping[str, Sequence[str | None]]) -> str:
    """The table for a terminal of 80 columns; below it, where the configs differ.

    The last columns are left out where there is no room for them. Of a field that differs the most
    common value is said once, and the others beside their runs.

    Args:
        runs: to compare.
        fields: of `differing`.
    """
    rows = _shown(runs, one_method=len({run.method for run in runs}) == 1)
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while (room := COLUMNS - sum(len(_GAP) + w for w in width[1:])) < _SHORTEST:
        rows, width = [row[:-1] for row in rows], width[:-1]
    width[0] = min(width[0], room)
    lines = [
        _GAP.join([_cut(row[0], width[0]).ljust(width[0])]
                  + [cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True)]).rstrip()
        for row in rows
    ]  # fmt: skip
    if fields:
        common = {name: _most_common(values) for name, values in fields.items()}
        said = [f"{name}={value}" for name, value in common.items()]
        lines += ["", *_wrapped("Their configs differ. Most common", said)]
        for i, run in enumerate(runs):
            own = [f"{n}={v[i]}" for n, v in fields.items() if v[i] not in (None, common[n])]
            lines += _wrapped(run.name, own) if own else []
    elif len(runs) > 1:
        lines += ["", "Their configs do not differ."]
    return "\n".join(lines)


def _most_common(values: Sequence[str | None]) -> str | None:
    """The first of the most common ones; None is none."""
    return collections.Counter(x for x in values if x is not None).most_common(1)[0][0]


def _wrapped(name: str, parts: Sequence[str]) -> list[str]:
    """Lines of 80 columns; a value with a space in it stays whole."""
    lines = [f"{name}:"]
    for i, part in enumerate(parts):
        text = f" {part}{',' if i < len(parts) - 1 else ''}"
        if len(lines[-1]) + len(text) <= COLUMNS:
            lines[-1] += text
        else:
            lines.append(f"   {text}")
    return lines


def _shown(runs: Sequence[Run], one_method: bool) -> list[list[str]]:
    """Heading and rows; without columns that are empty in every run, or say one thing of all."""
    columns = {name: [make(run) for run in runs] for name, make in _SHOWN.items()}
    columns |= {
        heading: [_number(run.last(name)) for run in runs] for name, heading in _OPTIONAL.items()
    }
    kept = {
        name: cells for name, cells in columns.items()
        if name == "run" or (any(cells) and not (name == "method" and one_method))
    }  # fmt: skip
    return [list(kept), *map(list, zip(*kept.values(), strict=True))]


def _cut(name: str, width: int) -> str:
    """A name in `width` columns, cut in its middle: both ends tell runs apart."""
    if len(name) <= width:
        return name
    left = (width - 1) // 2
    return f"{name[:left]}…{name[len(name) - (width - 1 - left) :]}"


def markdown(runs: Sequence[Run], fields: Mapping[str, Sequence[str | None]]) -> str:
    """One table of all: the columns of `text`, then the fields that differ."""
    heading, *rows = _shown(runs, one_method=False)
    heading += [f"`{name}`" for name in fields]
    rows = [row + [values[i] or "" for values in fields.values()] for i, row in enumerate(rows)]
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(
        f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |\n" for row in lines
    )


def as_csv(runs: Sequence[Run], fields: Mapping[str, Sequence[str | None]]) -> str:
    """The same with all digits, accuracies in [0, 1], and names as in `metrics.jsonl`."""
    exact: dict[str, Callable[[Run], Any]] = dict(_EXACT)
    for name in _OPTIONAL:
        if any(run.last(name) is not None for run in runs):
            exact[name] = operator.methodcaller("last", name)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*exact, *(f"config.{name}" for name in fields)])
    for i, run in enumerate(runs):
        cells = [make(run) for make in exact.values()]
        writer.writerow(cells + [values[i] for values in fields.values()])
    return out.getvalue()
