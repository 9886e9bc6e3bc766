"""`report.html`: a run at a glance, in one self-contained file that needs no network."""

import base64
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from common import version
from common.data.feed.pipeline import images_of
from common.data.sources.base import Source
from common.evaluate import knn
from common.evaluate.feature_files import Embedded, printable
from common.evaluate.page import feature_map, history, inline
from common.run import files

_HERE = pathlib.Path(__file__).parent
_QUERIES, _NEIGHBOURS = 8, 7
_CHUNK = 256  # images decoded at a time


@dataclasses.dataclass(frozen=True)
class Run:
    """What the page shows of a run beside the features of its encoder.

    Attributes:
        subject: which encoder, for a sentence.
        workdir: has `config.json`, and `metrics.jsonl` and `results.jsonl` if there are any.
        image_size: side of the images that the encoder sees, in pixels.
        pairs: int ids `[m]` of some examples of the source, and the augmented views of each,
            uint8 `[m, 2, h, w, 3]`; m may be 0.
    """

    subject: str
    workdir: epath.Path
    image_size: int
    pairs: tuple[np.ndarray, np.ndarray]


def write(
    path: epath.Path, run: Run, source: Source, embedded: Embedded, points: int, seed: int
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        run: whose encoder made the features.
        source: the images.
        embedded: their features.
        points: at most this many images in the map.
        seed: of their choice, and of t-SNE.
    """
    n, size = len(embedded.ids), run.image_size
    chosen = np.random.default_rng(seed).permutation(n)[:points]
    names = _shown_names(embedded.names)
    classes = tuple(printable(str(name)) for name in embedded.class_names)
    pictured = source.kind != "stream"  # which has no random access
    atlas, cells = _atlas(source, embedded.ids[chosen], size) if pictured else ("", {})
    text = _render(
        subject=run.subject,
        about=embedded.about,
        workdir=printable(run.workdir.name),
        data=printable(source.name),
        split=printable(source.split),
        n=n,
        dimensions=embedded.features.shape[1],
        classes=len(classes),
        labelled=bool((embedded.labels >= 0).any()),
        map=_map(embedded, chosen, names, classes, seed),
        atlas=atlas,
        cells=cells,
        rows=_neighbours(source, embedded, names, classes, size) if pictured else [],
        pairs=_pairs(run, source, dict(zip(embedded.ids.tolist(), names, strict=True))),
        **history.curves(run.workdir),
        label_free=history.label_free(run.workdir),
        results=history.results(run.workdir),
        settings=history.settings(run.workdir),
        code=version.in_words(),
        jax=jax.__version__,
    )
    files.write_text(path, text)


def _map(
    embedded: Embedded,
    chosen: np.ndarray,
    names: list[str],
    classes: tuple[str, ...],
    seed: int,
) -> feature_map.Map:
    """Of some rows; `names` and `classes` are those of `Embedded`, as they are shown."""
    features, labels = embedded.features[chosen], embedded.labels[chosen]
    nearest = None
    if len(chosen) > 1:
        found = knn.neighbours(features, features, 2)[0]
        itself = found[:, 0] == np.arange(len(chosen))
        nearest = np.where(itself, found[:, 1], found[:, 0])
    shown = [names[i] for i in chosen]
    return feature_map.make(features, labels, nearest, shown, classes, seed)


def _atlas(source: Source, ids: np.ndarray, image_size: int) -> tuple[str, dict[str, int]]:
    """Thumbnails of the images of the map; see `inline.atlas`."""
    parts = [ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK)]
    small = [inline.thumbnails(images_of(source, part, image_size)) for part in parts]
    return inline.atlas(np.concatenate(small))


def _neighbours(
    source: Source, embedded: Embedded, names: list[str], classes: tuple[str, ...], size: int
) -> list[list[dict]]:
    """Rows of a query and the images nearest to it in the same split."""
    n = len(embedded.ids)
    k = min(_NEIGHBOURS, n - 1)
    if k < 1:
        return []
    # evenly spaced, so that sorted splits show several classes
    queries = np.unique(np.linspace(0, n - 1, min(_QUERIES, n)).astype(int))
    found, similarity = knn.neighbours(embedded.features, embedded.features[queries], k + 1)
    rows = []
    for query, nearest, cosines in zip(queries, found, similarity, strict=True):
        others = [(i, s) for i, s in zip(nearest, cosines, strict=True) if i != query][:k]
        row_ids, row_cosines = zip((query, 1.0), *others, strict=True)
        images = images_of(source, embedded.ids[list(row_ids)], size)
        row = []
        for i, image, cosine in zip(row_ids, images, row_cosines, strict=True):
            label, wanted = int(embedded.labels[i]), int(embedded.labels[query])
            row.append(
                {
                    "uri": inline.image_uri(image),
                    "name": names[i],
                    "class": classes[label] if label >= 0 else "",
                    "same": None if min(label, wanted) < 0 else label == wanted,
                    "cosine": float(cosine),
                }
            )
        rows.append(row)
    return rows


def _pairs(run: Run, source: Source, names: dict[int, str]) -> list[dict]:
    """Images and the views that this run's augmentation makes of each."""
    ids, views = run.pairs
    if not len(ids):
        return []
    originals = images_of(source, ids, run.image_size)
    return [
        {
            "uris": [inline.image_uri(image) for image in (original, *pair)],
            "name": names.get(int(i), str(i)),
        }
        for i, original, pair in zip(ids, originals, views, strict=True)
    ]


def _shown_names(names: np.ndarray) -> list[str]:
    """Names for the page: absolute paths (shards keep them) without their common prefix."""
    shown = [printable(str(name)) for name in names]
    if shown and all(name.startswith("/") or "://" in name for name in shown):
        common = os.path.commonprefix(shown)  # noqa: RUF071, the next line cuts it at a slash
        common = common[: common.rfind("/") + 1]
        shown = [name.removeprefix(common) for name in shown]
    return shown


def _render(**values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,  # names come from users' disks
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((_HERE / name).read_text() for name in ("page.js", "page.css"))
    # The browser runs this script and no other, whatever else gets into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        script=script, style=style, digest=digest, **values
    )
