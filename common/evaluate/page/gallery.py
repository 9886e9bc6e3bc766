"""Rows of pictures for the page: which image, its name, and what is said of it."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from common.data.feed.pipeline import images_of
from common.data.sources.base import Source
from common.evaluate import knn
from common.evaluate.duplicates import Group
from common.evaluate.feature_files import Embedded, printable
from common.evaluate.findings import shown_size
from common.evaluate.page import inline, names
from common.evaluate.query import Query
from common.evaluate.structure import Structure

_QUERIES, _NEIGHBOURS = 8, 7
_CHUNK = 256  # images decoded at a time
_COLUMNS = 8
_MANY = 24  # pictures of each cluster, where they are few
CLUSTERS = 40  # on the page
GROUPS, COPIES = 24, 8
ODD = 16


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The images of an `Embedded`, to be shown.

    Attributes:
        source: has random access.
        embedded: ids, labels and features of the images.
        image_size: side of the images that the encoder sees, in pixels.
    """

    source: Source
    embedded: Embedded
    image_size: int

    @functools.cached_property
    def folder_and_names(self) -> tuple[str, list[str]]:
        """See `names.below`."""
        return names.below(self.embedded.names)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, as they are shown."""
        return tuple(printable(str(name)) for name in self.embedded.class_names)

    @property
    def shown_size(self) -> int:
        """Side of the pictures, in pixels; see `findings.shown_size`."""
        return shown_size(self.source, self.image_size)

    def cells(self, rows: Sequence[int] | np.ndarray, most: int = inline.SMALL) -> list[dict]:
        """Pictures of some rows, at most `most` pixels wide, with names and classes."""
        rows = np.asarray(rows, np.int64)
        out = []
        for part in (rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)):
            images = images_of(self.source, self.embedded.ids[part], self.shown_size)
            for row, image in zip(part, images, strict=True):
                out.append(self._cell(int(row), inline.image_uri(image, most)))
        return out

    def _cell(self, row: int, uri: str) -> dict:
        name, label = self.folder_and_names[1][row], int(self.embedded.labels[row])
        return {
            "uri": uri,
            "name": name,
            "short": names.middle(name.rpartition("/")[2] or name),
            "class": self.classes[label] if 0 <= label < len(self.classes) else "",
        }

    def atlas(self, rows: np.ndarray) -> tuple[str, dict[str, int]]:
        """Thumbnails of the images of the map; see `inline.atlas`."""
        ids, side = self.embedded.ids[rows], inline.cell_side(len(rows))
        parts = [ids[i : i + _CHUNK] for i in range(0, len(ids), _CHUNK)]
        small = [
            inline.thumbnails(images_of(self.source, part, self.shown_size), side) for part in parts
        ]
        return inline.atlas(np.concatenate(small))


def neighbours(gallery: Gallery) -> list[list[dict]]:
    """Rows of a query and the images nearest to it in the same split."""
    embedded = gallery.embedded
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
        rows.append([(int(query), 1.0), *others])
    cells = iter(gallery.cells([i for row in rows for i, _ in row], inline.LARGE))
    return [_compared(embedded.labels, row, [next(cells) for _ in row]) for row in rows]


def _compared(labels: np.ndarray, row: list[tuple[int, float]], cells: list[dict]) -> list[dict]:
    """Says of the images of a row how similar they are to its first, and whether of its class."""
    wanted = int(labels[row[0][0]])
    for (i, cosine), cell in zip(row, cells, strict=True):
        label = int(labels[i])
        cell["same"] = None if min(label, wanted) < 0 else label == wanted
        cell["cosine"] = float(cosine)
    return cells


def found(gallery: Gallery, queries: list[Query]) -> list[dict]:
    """The user's own images, each with what is most like it."""
    out = []
    for query in queries:
        cells = gallery.cells(query.rows, inline.LARGE)
        for cell, cosine in zip(cells, query.cosines, strict=True):
            cell["cosine"] = float(cosine)
        name = printable(query.name)
        own = {
            "uri": inline.image_uri(query.image),
            "name": name,
            "short": names.middle(name),
            "class": "",
        }
        out.append({"query": own, "cells": cells})
    return out


def clusters(gallery: Gallery, structure: Structure) -> list[dict]:
    """The largest clusters, each with the images nearest to its mean, and see `samples`."""
    labels, centres = structure.clusters.labels, structure.clusters.centres
    unit = gallery.embedded.features[structure.rows].astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    chosen = []
    for cluster, centre in enumerate(centres[:CLUSTERS]):
        own = np.flatnonzero(labels == cluster)
        distance = ((unit[own] - unit[own].mean(0)) ** 2).sum(1)
        distance[own == centre] = -1  # the first, also where k-means measured otherwise
        best = own[np.argsort(distance, kind="stable")][samples(len(own), len(centres))]
        chosen.append((len(own), structure.rows[best]))
    cells = iter(gallery.cells(np.concatenate([rows for _, rows in chosen])))
    return [{"size": size, "cells": [next(cells) for _ in rows]} for size, rows in chosen]


def samples(size: int, clusters: int) -> np.ndarray:
    """Which images of a cluster to show, by their rank in the distance from its mean.

    The nearest 8; where there are few clusters, 8 or 16 more between them and the edge.
    """
    nearest = np.arange(min(size, _COLUMNS))
    more = min(_MANY - _COLUMNS, max(0, 64 // clusters - _COLUMNS) // _COLUMNS * _COLUMNS)
    spread = np.linspace(_COLUMNS, size - 1, min(more, max(0, size - _COLUMNS)))
    return np.concatenate([nearest, spread.astype(int)])


def duplicates(gallery: Gallery, groups: list[Group]) -> list[dict]:
    """The first groups of near-duplicates, side by side."""
    shown = groups[:GROUPS]
    if not shown:
        return []
    cells = iter(gallery.cells(np.concatenate([group.rows[:COPIES] for group in shown])))
    out = []
    for group in shown:
        row = [next(cells) for _ in group.rows[:COPIES]]
        for i, cell in enumerate(row[1:], 1):
            cell |= {
                "cosine": float(group.cosines[i]),
                "difference": float(group.differences[i]),
                "mirrored": bool(group.mirrored[i]),
            }
        out.append({"size": len(group.rows), "cells": row})
    return out


def odd(gallery: Gallery, structure: Structure) -> list[dict]:
    """The images farthest from the others, the farthest first."""
    if structure.collapsed or len(structure.rows) < 3:
        return []
    order = np.argsort(-structure.oddness, kind="stable")[:ODD]
    cells = gallery.cells(structure.rows[order])
    for cell, oddness in zip(cells, structure.oddness[order], strict=True):
        cell["oddness"] = float(oddness)
    return cells
