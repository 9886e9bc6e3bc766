"""`--mode=embed`: the features of any images, as files and as a page to look at."""

import contextlib
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from common.data.feed.recipe import FeedRecipe
from common.data.sources import slices
from common.data.sources.base import Source
from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import everything, feature_files, label_file, query, spreadsheet
from common.evaluate.feature_files import Embedded
from common.evaluate.findings import find
from common.evaluate.page import build
from common.evaluate.pretrained import Pretrained, canonical, say_summary
from common.run import console, jsonl
from common.sharding import of_first_process
from common.train import summary

_PAIRS = 8  # augmented pairs on the page
_NEAREST = 5  # images that the sentence names for a query


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Writes the features of one split, and `report.html`; see `settings.embed`.

    An image that cannot be decoded gets no row: with `on_corrupt="replace"`, which substitutes
    another image everywhere else, it is left out here.
    """
    c = opened.settings.embed
    formats = feature_files.formats_of(c.format)
    if c.examples < 0 or c.points < 1 or c.clusters < 0:
        raise UserError(
            f"eval.embed.examples={c.examples}, eval.embed.points={c.points} and "
            f"eval.embed.clusters={c.clusters}: expected at least 0, 1 and 0"
        )
    source = _open(opened)
    about = _about(opened, source)
    stem = _stem(about, opened.settings)
    of_first_process(_check_free, opened, source, f"{stem}.npz")
    shrink = opened.config.data.get("shrink", 0)
    queries = of_first_process(query.read, c.query, source, shrink)
    images = everything.features_of(opened, source, c.examples)
    features, labels, names = images.features, images.labels, images.names
    embedded = Embedded(
        features, labels, images.ids, names,
        source.class_names or tuple(f"class {i}" for i in range(source.num_classes)),
        about, images.left_out,
    )  # fmt: skip
    searched = query.search(opened, queries, features)
    written = [opened.workdir / f"{stem}.{kind}" for kind in dict.fromkeys([*formats, "csv"])]
    if c.report:
        written += [opened.workdir / name for name in ("duplicates.csv", "report.html")]
    tables = of_first_process(_write, opened, source, embedded, searched, formats, written)
    written = [path.with_name(tables.get(path.name, path.name)) for path in written]
    n, d = features.shape
    metrics = {
        "examples": n,
        "dimensions": d,
        "labelled": int((labels >= 0).sum()),
        "left_out": len(images.left_out),
        "embedded_source": opened.config.data.source,
        "embedded_split": source.split,
        "files": [path.name for path in written],
        "tables": of_first_process(_digests, written),
    }
    if searched:
        metrics["query"] = {
            q.name: {
                feature_files.printable(str(names[i])): round(float(cosine), 4)
                for i, cosine in zip(q.rows, q.cosines, strict=True)
            }
            for q in searched
        }
    return metrics, (
        f"{d:,} features of {n:,} images of {source.name} ({source.split}) by "
        f"{opened.subject}: {', '.join(str(path) for path in written)}"
        + images.damage
        + "".join(_found(q, names) for q in searched)
    )


def _write(
    opened: Pretrained,
    source: Source,
    embedded: Embedded,
    searched: list[query.Query],
    formats: list[str],
    written: list[epath.Path],
) -> dict[str, str]:
    """Writes the files of features, and with `eval.embed.report` the page and its tables.

    Returns:
        The names of the tables, by those that they have unless somebody has changed the old one.
    """
    c, s = opened.settings.embed, opened.settings
    free = {
        path: label_file.free(path, _as_written) if path.suffix == ".csv" else path
        for path in written
    }
    found, groups, places = None, None, {}
    if c.report:
        findings = find(source, embedded, opened.image_size, s.seed, c.clusters, searched)
        found, groups = findings.structure, findings.duplicates
        chosen, drawn = build.draw(source, embedded, findings, c.points, s.seed)
        places = {int(row): point[:2] for row, point in zip(chosen, drawn.points, strict=True)}
        tables = tuple(path.name for path in free.values() if path.suffix == ".csv")
        page = _page_run(opened, source, tables)
        build.write(
            opened.workdir / "report.html", page, source, embedded, findings, (chosen, drawn)
        )
    for path in written:
        if path.name == "duplicates.csv":
            spreadsheet.write(free[path], *spreadsheet.duplicates(embedded, groups or []))
        elif path.suffix == ".csv":
            table = spreadsheet.images(
                embedded, found, groups or (), places, features="csv" in formats
            )
            spreadsheet.write(free[path], *table)
        elif path.suffix[1:] in feature_files.WRITERS:
            feature_files.WRITERS[path.suffix[1:]](path, embedded)
    for path, other in free.items():
        if path != other:
            console.say(f"{shown(path)} was changed and stays as it is; {other.name} is new.")
    return {path.name: other.name for path, other in free.items() if path.suffix == ".csv"}


def _digests(written: list[epath.Path]) -> dict[str, str]:
    return {path.name: label_file.digest(path) for path in written if path.suffix == ".csv"}


def _as_written(path: epath.Path) -> bool:
    """Whether nobody has typed into a table, e.g. labels, since this mode wrote it."""
    ours = any(path.name in record.get("tables", ()) for record in jsonl.results(path.parent))
    return not ours or label_file.as_written(path)


def _found(q: query.Query, names: np.ndarray) -> str:
    """The nearest images of a query, for the sentence."""
    near = ", ".join(
        f"{shown(str(names[i]))} ({cosine:.3f})"
        for i, cosine in zip(q.rows[:_NEAREST], q.cosines, strict=False)
    )
    return f"; most like {shown(q.name)}: {near}"


def _open(opened: Pretrained) -> Source:
    """Opens the split named, else test, else train (a folder of photos has no other).

    Of images without labels, or of other data than the run's, of which the test split is a part
    held out, all are opened.
    """
    source = _named(opened)
    named = opened.settings.embed.split or opened.settings.test_split
    scored = source.num_classes and not opened.settings.source  # other data have trained nothing
    if named or scored or slices.parse(source.split)[1] is None:
        say_summary(source)
        return source
    return everything.open_all(opened)


def _named(opened: Pretrained) -> Source:
    split = opened.settings.embed.split
    try:
        if split:  # opened as a test split, so that its classes are numbered as those of train
            with opened.config.unlocked():
                opened.config.data.test_split = split
        return opened.open("test", quiet=True)
    except UserError as error:
        if not split and not opened.settings.test_split:
            return opened.open("train", quiet=True)
        raise UserError(f"{error} (Here: --eval.embed.split=NAME.)") from error


def _page_run(opened: Pretrained, source: Source, tables: tuple[str, ...] = ()) -> build.Run:
    pairs = np.zeros(0, np.int64), np.zeros((0, 2, 1, 1, 3), np.uint8)
    if source.kind != "stream":  # which has no random access
        n = min(_PAIRS, source.num_examples)
        pairs = summary.some_pairs(FeedRecipe.of(opened.config), source, n)
    return build.Run(opened.subject, opened.workdir, opened.image_size, pairs, tables)


def _about(opened: Pretrained, source: Source) -> dict[str, Any]:
    s = opened.settings
    about = {"method": opened.config.method, "features": s.features, "layer": s.layer}
    if s.features == "pixels":
        del about["layer"]
    return about | {
        "checkpoint_step": opened.step,
        "data": source.name,
        "split": source.split,
        "image_size": opened.image_size,
    }


def _check_free(opened: Pretrained, source: Source, name: str) -> None:
    """Refuses to replace the features of other images, of a folder of the same name.

    Images of the same names are the same: their folder has moved.

    Raises:
        UserError: by results.jsonl, the file is of another source.
    """
    path, now = opened.workdir / name, opened.config.data.source
    if not path.exists():
        return
    sources = [
        record.get("embedded_source")
        for record in jsonl.results(opened.workdir)
        if name in record.get("files", ())
    ]
    if not sources or not sources[-1] or canonical(sources[-1]) == canonical(now):
        return
    with contextlib.suppress(OSError, ValueError, KeyError), path.open("rb") as file:
        found = np.load(file)
        before = {*found["names"].tolist(), *found["left_out"].tolist()}
        if before == set(source.names(np.arange(source.num_examples)).tolist()):
            return
    raise UserError(
        f"{path} holds features of {sources[-1]}, and {now} has the same "
        "name: move that file and its table away first, or rename the folder"
    )


def _stem(about: dict[str, Any], settings: ConfigDict) -> str:
    """Name of the files: one for each question, so that none overwrites the answer to another.

    Names come from the user's disk and flags, and must not lead out of the workdir.
    """
    parts = ["features", about["data"], about["split"]]
    if about["features"] != "trained":
        parts.append(about["features"])
    if about.get("layer", "backbone") != "backbone":
        parts.append(about["layer"])
    if settings.step:
        parts.append(f"step{settings.step}")
    if settings.image_size:
        parts.append(f"{settings.image_size}px")
    if settings.embed.examples:
        parts.append(f"{settings.embed.examples}images")
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in "-".join(parts))[:150]
