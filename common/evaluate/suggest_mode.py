"""`--mode=suggest`: a list of the images to label first."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from common.data.sources.base import Source
from common.data.sources.folder_source import shown
from common.errors import UserError, one_of
from common.evaluate import everything, few_labels, label_file, label_match, spreadsheet
from common.evaluate.page import label_page
from common.evaluate.pretrained import Pretrained
from common.evaluate.suggest import suggest
from common.run import console
from common.sharding import of_first_process

NAME = "label_these"
_COLUMNS = (label_file.FILE, label_file.LABEL, "cluster_size")
_POOL = 10  # times as many images as wanted, the least sure ones, with `by=margin`


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Writes `label_these.csv`, for labels to be typed into, and a page with its images.

    A table into which somebody has typed is never replaced: the new one gets a number.
    """
    s, c = opened.settings, opened.settings.suggest
    one_of("eval.suggest.by", c.by, ("clusters", "margin"))
    if c.number < 1:
        raise UserError(f"eval.suggest.number={c.number}: expected at least one image")
    table = (
        of_first_process(label_file.read_all, s.label.csv, "eval.label.csv") if s.label.csv else []
    )
    if c.by == "margin" and len({row.label for row in table}) < 2:
        raise UserError(
            "eval.suggest.by=margin asks for what a classifier is least sure of, which needs "
            "labels of two classes: give --eval.label.csv=FILE, or leave it at clusters"
        )
    source = everything.open_all(opened, c.split, "eval.suggest.split")
    if table:
        label_match.check(table, source)
    images = everything.features_of(opened, source)
    names = label_match.names_of(images)[: len(images.names)]
    given, damaged = label_match.given(table, images)
    rows = np.array(list(given), np.int64)
    pool = np.arange(len(names))
    if len(given) == len(names):
        raise UserError(f"{s.label.csv} has a label for each of the {len(names):,} images already")
    if c.by == "margin":
        classes, labels = label_match.classes_of(given.values())
        trainer = few_labels.Trainer.of(images.features, len(classes), s)
        rest = np.setdiff1d(pool, rows)
        margins = few_labels.margins(trainer.predict(rows, labels, rest).probabilities)
        pool = np.sort(rest[np.argsort(margins, kind="stable")[: _POOL * c.number]])
    found = suggest(images.features, rows, pool, c.number, s.seed)
    chosen = [names[i] for i in found.rows]
    known = sorted(set(given.values()))
    name, digest = of_first_process(
        _write, opened, source, images.ids[found.rows], chosen, found.sizes.tolist(), known
    )
    path = opened.workdir / name
    page = path.with_suffix(".html")
    _say_kept(opened.workdir / f"{NAME}.csv", path, s.label.csv)
    metrics = {
        "suggested": len(chosen),
        "sha256": digest,
        "by": c.by,
        "images": len(names),
        "passed_over": found.passed_over,
        "given": len(given),
        "left_out": len(images.left_out),
        "suggested_split": source.split,
        "files": [path.name, page.name],
    }
    return metrics, (
        f"{len(chosen):,} of {len(names):,} images of {source.name} ({source.split}) to label "
        f"first, by {opened.subject}: type the labels into {path}; {page} shows the images"
        + _fewer(c.number, len(chosen), len(names) - len(given))
        + damaged
        + images.damage
    )


def _write(
    opened: Pretrained,
    source: Source,
    ids: np.ndarray,
    names: Sequence[str],
    sizes: Sequence[int],
    classes: Sequence[str],
) -> tuple[str, str]:
    """Writes the table and its page, under another name where one must be kept.

    Returns:
        Name and digest of the table.
    """
    path = label_file.free(opened.workdir / f"{NAME}.csv", label_file.as_written)
    spreadsheet.write(path, _COLUMNS, zip(names, [""] * len(names), sizes, strict=True))
    page = path.with_suffix(".html")
    label_page.write(page, opened, source, ids, names, sizes, classes, path.name)
    return path.name, label_file.digest(path)


def _fewer(wanted: int, found: int, left: int) -> str:
    """Why there are fewer suggestions than were asked for."""
    if found >= wanted:
        return ""
    if left < wanted:
        return f"; fewer than the {wanted:,} asked for: only {left:,} have no label yet"
    missing = wanted - found
    return f"; {missing:,} fewer than asked for, since the others are nearly the same as these"


def _say_kept(first: epath.Path, path: epath.Path, csv: str) -> None:
    if path != first and not csv:
        console.say(
            f"{shown(first)} was changed and stays as it is. With --eval.label.csv={shown(first)} "
            "images that have a label there are not suggested again."
        )
