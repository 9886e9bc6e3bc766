"""`report.html`: a run at a glance, in one self-contained file that needs no network."""

import dataclasses

import jax
import numpy as np
from etils import epath

from common import version
from common.data.feed.pipeline import images_of
from common.data.sources.base import Source
from common.evaluate import duplicates, structure
from common.evaluate.feature_files import Embedded, printable
from common.evaluate.findings import Findings
from common.evaluate.page import feature_map, gallery, history, inline, template
from common.evaluate.page.gallery import Gallery
from common.run import files


@dataclasses.dataclass(frozen=True)
class Run:
    """What the page shows of a run beside the features of its encoder.

    Attributes:
        subject: which encoder, for a sentence.
        workdir: has `config.json`, and `metrics.jsonl` and `results.jsonl` if there are any.
        image_size: side of the images that the encoder sees, in pixels.
        pairs: int ids `[m]` of some examples of the source, and the augmented views of each,
            uint8 `[m, 2, h, w, 3]`; m may be 0.
        tables: names of the files beside the page.
    """

    subject: str
    workdir: epath.Path
    image_size: int
    pairs: tuple[np.ndarray, np.ndarray]
    tables: tuple[str, ...] = ()


def draw(
    source: Source, embedded: Embedded, findings: Findings, points: int, seed: int
) -> tuple[np.ndarray, feature_map.Map]:
    """The map of at most `points` images, chosen at random: their rows, and what is drawn.

    Colours are those of classes, or of clusters where nothing is labelled.

    Args:
        source: the images.
        embedded: their features.
        findings: their clusters.
        points: at most this many.
        seed: of their choice, and of t-SNE.
    """
    chosen = np.random.default_rng(seed).permutation(len(embedded.ids))[:points]
    show = Gallery(source, embedded, 0)
    names = show.folder_and_names[1]
    features, labels_of_all = embedded.features[chosen], embedded.labels
    classes, nearest = show.classes, None
    if (embedded.labels < 0).all():
        found = findings.structure
        labels_of_all = found.spread_out(found.clusters.labels, len(embedded.ids), -1)
        classes = tuple(f"cluster {i + 1}" for i in range(len(found.clusters.centres)))
    elif len(chosen) > 1:
        nearest = structure.nearest_others(features, 1)[0][:, 0]
    shown = [names[i] for i in chosen]
    return chosen, feature_map.make(
        features, labels_of_all[chosen], nearest, shown, classes, seed, labels_of_all
    )


def write(
    path: epath.Path,
    run: Run,
    source: Source,
    embedded: Embedded,
    findings: Findings,
    drawn: tuple[np.ndarray, feature_map.Map],
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        run: whose encoder made the features.
        source: the images.
        embedded: their features.
        findings: what was found in them.
        drawn: of `draw`.
    """
    chosen, drawn_map = drawn
    show = Gallery(source, embedded, run.image_size)
    pictured = source.kind != "stream"  # which has no random access
    atlas, cells = show.atlas(chosen) if pictured else ("", {})
    folder, names = show.folder_and_names
    found = findings.structure
    text = template.render(
        "page.html",
        "page.js",
        subject=run.subject,
        about=embedded.about,
        workdir=printable(run.workdir.name),
        data=printable(source.name),
        split=printable(source.split),
        folder=folder,
        tables=run.tables,
        left_out=[printable(str(name)).removeprefix(folder) for name in embedded.left_out],
        n=len(embedded.ids),
        compared=len(found.rows),
        dimensions=embedded.features.shape[1],
        classes=len(show.classes),
        labelled=bool((embedded.labels >= 0).any()),
        map=drawn_map,
        atlas=atlas,
        cells=cells,
        found=gallery.found(show, findings.queries) if pictured else [],
        structure=found,
        numbers=structure.numbers(len(found.rows)),
        clusters=gallery.clusters(show, found) if pictured else [],
        groups=findings.duplicates,
        limit=duplicates.DIFFERENCE,
        duplicates=gallery.duplicates(show, findings.duplicates or []),
        odd=gallery.odd(show, found) if pictured else [],
        rows=gallery.neighbours(show) if pictured else [],
        pairs=_pairs(run, source, dict(zip(embedded.ids.tolist(), names, strict=True))),
        **history.curves(run.workdir),
        label_free=history.label_free(run.workdir),
        results=history.results(run.workdir),
        settings=history.settings(run.workdir),
        code=version.in_words(),
        jax=jax.__version__,
    )
    files.write_text(path, text)


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
