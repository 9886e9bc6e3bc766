"""`--mode=embed`: the features of any images, as files and as a page to look at."""

from typing import Any

import jax
import numpy as np

from common.data.feed.recipe import FeedRecipe
from common.data.sources.base import Source, listed
from common.data.sources.folder_source import shown
from common.errors import UserError
from common.evaluate import feature_files
from common.evaluate.everything import check_finite, damaged
from common.evaluate.feature_files import Embedded
from common.evaluate.page import build
from common.evaluate.pretrained import Pretrained
from common.train import summary

_PAIRS = 8  # augmented pairs on the page


def run(opened: Pretrained) -> tuple[dict[str, Any], str]:
    """Writes the features of one split, and `report.html`; see `settings.embed`.

    An image that cannot be decoded gets no row: with `on_corrupt="replace"`, which substitutes
    another image everywhere else, it is left out here.
    """
    c, s = opened.settings.embed, opened.settings
    formats = feature_files.formats_of(c.format)
    if c.examples < 0 or c.points < 1:
        raise UserError(
            f"eval.embed.examples={c.examples} and eval.embed.points={c.points}: expected at "
            "least 0 and 1"
        )
    source = _open(opened)
    if source.on_corrupt == "replace":
        source.on_corrupt = "leave out"  # `common.data.feed.corrupt.LEAVE_OUT`, without TensorFlow
    features, labels, ids = opened.extract(source, c.examples)
    names = source.names(ids)
    gone = damaged(source, ids)
    left_out = names[gone]
    features, labels, ids, names = (x[~gone] for x in (features, labels, ids, names))
    check_finite(features)
    embedded = Embedded(
        features, labels, ids, names,
        source.class_names or tuple(f"class {i}" for i in range(source.num_classes)),
        _about(opened, source), left_out,
    )  # fmt: skip
    written = [opened.workdir / f"{_stem(embedded.about)}.{kind}" for kind in formats]
    page = opened.workdir / "report.html"
    if jax.process_index() == 0:
        for path, kind in zip(written, formats, strict=True):
            feature_files.WRITERS[kind](path, embedded)
        if c.report:
            build.write(page, _page_run(opened, source), source, embedded, c.points, s.seed)
    if c.report:
        written.append(page)
    n, d = features.shape
    metrics = {
        "examples": n,
        "dimensions": d,
        "labelled": int((labels >= 0).sum()),
        "left_out": len(left_out),
        "embedded_source": opened.config.data.source,
        "embedded_split": source.split,
        "files": [path.name for path in written],
    }
    return metrics, (
        f"{d:,} features of {n:,} images of {source.name} ({source.split}) by "
        f"{opened.subject}: {', '.join(str(path) for path in written)}"
        + listed([shown(name) for name in left_out], "damaged image", "left out")
    )


def _open(opened: Pretrained) -> Source:
    """Opens the split named, else test, else train (a folder of photos has no other)."""
    split = opened.settings.embed.split
    try:
        if split:  # opened as a test split, so that its classes are numbered as those of train
            with opened.config.unlocked():
                opened.config.data.test_split = split
        return opened.open("test")
    except UserError as error:
        if not split and not opened.settings.test_split:
            return opened.open("train")
        raise UserError(f"{error} (Here: --eval.embed.split=NAME.)") from error


def _page_run(opened: Pretrained, source: Source) -> build.Run:
    pairs = np.zeros(0, np.int64), np.zeros((0, 2, 1, 1, 3), np.uint8)
    if source.kind != "stream":  # which has no random access
        n = min(_PAIRS, source.num_examples)
        pairs = summary.some_pairs(FeedRecipe.of(opened.config), source, n)
    return build.Run(opened.subject, opened.workdir, opened.image_size, pairs)


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


def _stem(about: dict[str, Any]) -> str:
    """Name of the files: one for each split, layer and encoder, so that none overwrites another.

    Names come from the user's disk and flags, and must not lead out of the workdir.
    """
    parts = ["features", about["data"], about["split"]]
    if about["features"] != "trained":
        parts.append(about["features"])
    if about.get("layer", "backbone") != "backbone":
        parts.append(about["layer"])
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in "-".join(parts))[:150]
