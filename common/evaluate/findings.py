"""What `--mode=embed` finds in a set of images, for its page and its tables."""

import dataclasses
import functools

import numpy as np

from common.data.feed.pipeline import images_of
from common.data.sources.base import Source
from common.evaluate import duplicates, structure
from common.evaluate.feature_files import Embedded
from common.evaluate.query import Query
from common.evaluate.structure import Structure

_CHUNK = 256  # images decoded at a time
_SHARP = 128  # pixels


@dataclasses.dataclass(frozen=True)
class Findings:
    """Of the images of an `Embedded`.

    Attributes:
        structure: neighbours, odd ones out, clusters.
        duplicates: groups of near-duplicates; None where images cannot be read again.
        queries: images searched for, and what is most like them.
    """

    structure: Structure
    duplicates: list[duplicates.Group] | None
    queries: list[Query]


def find(
    source: Source, embedded: Embedded, image_size: int, seed: int, clusters: int,
    queries: list[Query],
) -> Findings:  # fmt: skip
    """Compares the images of a split with each other.

    Args:
        source: the images.
        embedded: their features.
        image_size: side of the images that the encoder sees, in pixels.
        seed: of the clusters.
        clusters: how many are wanted; 0 for as many as fit.
        queries: what was searched for, which is passed on.
    """
    found = structure.of_features(embedded.features, seed, clusters)
    groups = None
    if source.kind != "stream":  # which has no random access
        read = functools.partial(small_pictures, source, embedded.ids, image_size)
        groups = duplicates.find(embedded.features, found, read)
    return Findings(found, groups, queries)


def shown_size(source: Source, image_size: int) -> int:
    """The side at which images are looked at: of files more pixels than a small encoder sees.

    Fewer are blurred on a page, and a copy that is resized or mirrored is cropped a whole pixel
    off.
    """
    return max(image_size, _SHARP) if source.kind in ("path", "encoded") else image_size


def small_pictures(
    source: Source, ids: np.ndarray, image_size: int, rows: np.ndarray
) -> np.ndarray:
    """`duplicates.small_pictures` of some rows of `ids`, of which a part is decoded at a time."""
    size = shown_size(source, image_size)
    parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    return np.concatenate(
        [duplicates.small_pictures(images_of(source, ids[part], size)) for part in parts]
    )
