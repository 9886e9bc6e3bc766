"""`report.html`: a run at a glance, in one file that needs no network and no other file."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from common import config as configs
from common import version
from common.data.feed.pipeline import images_of
from common.data.sources.base import Source
from common.evaluate import knn
from common.evaluate.feature_files import Embedded, printable, shortened
from common.evaluate.page import feature_map, inline
from common.run import files, jsonl, pictures, saved_config

_HERE = pathlib.Path(__file__).parent
_QUERIES, _NEIGHBOURS = 8, 7
_CHUNK = 256  # images decoded at a time
# Of a line of results.jsonl: how it was made, in columns of their own or not shown.
_PROTOCOL = {
    "mode", "features", "layer", "checkpoint_step", "method", "source", "train_split",
    "test_split", "seed", "run_seed", "device", "jax", "command", "time",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What the page shows of a run beside the features of its encoder.

    Attributes:
        subject: which encoder, for a sentence.
        workdir: has `config.json`, and `metrics.jsonl` and `results.jsonl` if there are any.
        image_size: side of the images that the encoder sees, in pixels.
        pairs: int ids `[m]` of some examples of the source, and the two augmented views of each,
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
        points: most images in the map.
        seed: decides which they are, and of t-SNE.
    """
    n, size = len(embedded.ids), run.image_size
    chosen = np.random.default_rng(seed).permutation(n)[:points]
    names = _shown_names(embedded.names)
    classes = tuple(printable(str(name)) for name in embedded.class_names)
    labelled = bool((embedded.labels >= 0).any())
    saved = saved_config.read(run.workdir)
    pictured = source.kind != "stream"  # which has no random access
    text = _render(
        subject=run.subject,
        about=embedded.about,
        workdir=printable(run.workdir.name),
        data=printable(source.name),
        split=printable(source.split),
        n=n,
        dimensions=embedded.features.shape[1],
        classes=len(classes),
        labelled=labelled,
        pictured=pictured,
        map=_map(source, embedded, chosen, names, classes, size, seed),
        rows=_neighbours(source, embedded, names, classes, size) if pictured else [],
        pairs=_pairs(run, source, dict(zip(embedded.ids.tolist(), names, strict=True))),
        **_curves(run.workdir),
        results=_results(run.workdir),
        settings={k: shortened(_text(v)) for k, v in configs.flatten(saved).items()},
        code=version.in_words(),
        jax=jax.__version__,
    )
    files.write_text(path, text)


def _map(
    source: Source,
    embedded: Embedded,
    chosen: np.ndarray,
    names: list[str],
    classes: tuple[str, ...],
    image_size: int,
    seed: int,
) -> dict[str, Any]:
    features, labels = embedded.features[chosen], embedded.labels[chosen]
    places = feature_map.place(features, seed)
    places = 10 + 980 * (places - places.min(0) if len(chosen) > 1 else places)
    colours, legend = feature_map.colour(labels, classes)
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    agreement = None
    if len(chosen) > 1:
        found = knn.neighbours(features, features, 2)[0]
        mine = np.arange(len(chosen))
        nearest = np.where(found[:, 0] == mine, found[:, 1], found[:, 0])
        agreement = feature_map.same_class(nearest, labels)
    pictures_of = None
    if source.kind != "stream":
        ids = embedded.ids[chosen]
        parts = [ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK)]
        small = [inline.thumbnails(images_of(source, part, image_size)) for part in parts]
        pictures_of = inline.atlas(np.concatenate(small))
    return {
        "points": [
            (round(float(x), 1), round(float(y), 1), colour, int(label))
            for (x, y), colour, label in zip(places, colours, labels, strict=True)
        ],
        "height": max(300, math.ceil(places[:, 1].max()) + 10),
        "names": [names[i] for i in chosen],
        "class_names": classes,
        "legend": legend,
        "distinct": len([e for e in legend if e["label"] >= 0]) <= len(feature_map.PALETTE),
        "collapsed": bool(len(chosen) > 1 and np.ptp(places) == 0),
        # as `method.embedding_metrics`
        "spread": float(unit.std(0).mean() * math.sqrt(unit.shape[1])),
        "agreement": agreement,
        "atlas": pictures_of,
        "atlas_cells": {k: v for k, v in (pictures_of or {}).items() if k != "uri"},
    }


def _neighbours(
    source: Source, embedded: Embedded, names: list[str], classes: tuple[str, ...], size: int
) -> list[list[dict]]:
    """Rows of a query and the images nearest to it in the same split."""
    n = len(embedded.ids)
    k = min(_NEIGHBOURS, n - 1)
    if k < 1:
        return []
    # evenly spread, so that sorted sets show several classes
    queries = np.unique(np.linspace(0, n - 1, min(_QUERIES, n)).astype(int))
    found, similarity = knn.neighbours(embedded.features, embedded.features[queries], k + 1)
    rows = []
    for query, places, cosines in zip(queries, found, similarity, strict=True):
        others = [(p, s) for p, s in zip(places, cosines, strict=True) if p != query][:k]
        places = np.array([query, *(p for p, _ in others)])
        images = images_of(source, embedded.ids[places], size)
        row = []
        for place, image, cosine in zip(
            places, images, [1.0, *(s for _, s in others)], strict=True
        ):
            label, wanted = int(embedded.labels[place]), int(embedded.labels[query])
            row.append(
                {
                    "uri": inline.image_uri(image),
                    "name": names[place],
                    "class": classes[label] if label >= 0 else "",
                    "same": None if min(label, wanted) < 0 else label == wanted,
                    "cosine": float(cosine),
                }
            )
        rows.append(row)
    return rows


def _pairs(run: Run, source: Source, names: dict[int, str]) -> list[dict]:
    """Images and the two views that this run's augmentation makes of each."""
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


def _curves(workdir: epath.Path) -> dict[str, Any]:
    """The curves of `metrics.jsonl`, and where they begin and end, for the words above them."""
    path = workdir / jsonl.FILE
    records = jsonl.read(path) if path.exists() else []
    loss, knn, raw = (
        pictures.series(records, name)[1] for name in ("loss", "knn_top1", "knn_top1_raw_pixels")
    )
    drawn = io.BytesIO()
    if max(len(loss), len(knn)) > 1:
        pictures.curves(records, drawn)
    return {
        "curves": inline.data_uri(drawn.getvalue(), "png") if drawn.getvalue() else "",
        "loss": (loss[0], loss[-1]) if len(loss) else None,
        "knn": (100 * knn[0], 100 * knn[-1]) if len(knn) else None,
        "raw": 100 * raw[-1] if len(raw) else None,
    }


def _results(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of `results.jsonl` that say how good the features are; embeddings do not."""
    path = workdir / jsonl.RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a full disk
            continue
        if not isinstance(record, dict) or record.get("mode") == "embed":
            continue
        measured = {k: v for k, v in record.items() if k not in _PROTOCOL and v is not None}
        rows.append(
            {name: shortened(_text(record.get(name, ""))) for name in _PROTOCOL}
            | {"measured": [(name, _score(name, value)) for name, value in measured.items()]}
        )
    return rows


def _score(name: str, value: Any) -> str:
    """Accuracies as per cent, everything else as it is, but for the directories of paths."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_score(key, x)}" for key, x in value.items() if x is not None)
    if isinstance(value, list):
        return "; ".join(_score(name, x) for x in value)
    share = isinstance(value, float) and 0 <= value <= 1
    if share and any(part in name for part in ("top1", "top5", "accuracy")):
        return f"{100 * value:.2f} %"
    return shortened(_text(value))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)


def _shown_names(names: np.ndarray) -> list[str]:
    """Names for the page: of absolute paths (shards keep them) what they do not have in common."""
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
