"""Near-duplicates in a set of images: files copied, encoded again, resized or mirrored.

Features alone take two photographs of one scene for the same image, and pixels alone mean comparing
all pairs. So features say which pairs to look at, and small pictures of both decide.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from common.evaluate.structure import Structure

# In 3,667 photographs of flowers with 40 planted copies (exact, JPEG of quality 60, 3/4 of the
# size, mirrored) those of the copies were at most 0.08; three pairs of other names were at most
# 0.04, and are the same photographs; then came a series of exposures, 0.115, and 0.16 and more.
DIFFERENCE = 0.1
# Share of the mean distance of two images. The mirrored ones among those copies had up to 0.06; the
# pictures decide, so this only has to be wide enough.
_NEAR = 0.2
_ROUNDING = 1e-5  # of a cosine distance
_SIDE = 8  # of the small pictures, in pixels
_CONTRAST = 10.0  # grey levels; of a picture with less, as of a blank page, noise is a large share
_CHUNK = 4096  # pairs at a time


@dataclasses.dataclass(frozen=True)
class Group:
    """Images that are nearly the same.

    Attributes:
        rows: int64 `[m]`, m at least 2, ascending; of the features.
        cosines: float `[m]`, of the features to those of the first one.
        differences: float `[m]`, of the small pictures to that of the first one, see `difference`.
        mirrored: bool `[m]`, whether its mirror image is nearer to the first one.
    """

    rows: np.ndarray
    cosines: np.ndarray
    differences: np.ndarray
    mirrored: np.ndarray

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.rows)


def find(
    features: np.ndarray, structure: Structure, small: Callable[[np.ndarray], np.ndarray]
) -> list[Group]:
    """Groups of near-duplicates, those with the least difference first.

    Two images are near-duplicates where one is among the ten nearest of the other, at no more than
    a fifth of the mean distance of two images, and the `difference` of their small pictures is at
    most `DIFFERENCE`. What is a near-duplicate of a near-duplicate is in the same group.

    Args:
        features: `[n, d]`, any real type.
        structure: of these features.
        small: rows `[m]` of the features to the `small_pictures` of their images.
    """
    pairs = candidates(structure)
    if not len(pairs):
        return []
    rows, places = np.unique(pairs, return_inverse=True)
    pictures, places = small(rows), places.reshape(-1, 2)
    same = np.concatenate(
        [
            difference(pictures[part[:, 0]], pictures[part[:, 1]])[0] <= DIFFERENCE
            for part in (places[i : i + _CHUNK] for i in range(0, len(places), _CHUNK))
        ]
    )
    members = connected(places[same])
    groups = [_group(features, rows[part], pictures[part]) for part in members]
    return sorted(groups, key=lambda group: (group.differences[1:].min(), group.rows[0]))


def connected(pairs: np.ndarray) -> list[np.ndarray]:
    """The connected components of a graph, from its edges int `[p, 2]`: ascending numbers each."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            parent[i] = parent[parent[i]]  # halves the path for the next search
            i = parent[i]
        return i

    for a, b in pairs.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for i in sorted(parent):
        members.setdefault(root(i), []).append(i)
    return [np.array(part) for part in members.values()]


def candidates(structure: Structure) -> np.ndarray:
    """Pairs of rows with nearly the same features, int64 `[p, 2]`, each once, ascending."""
    most = _NEAR * structure.distance + _ROUNDING
    i, place = np.nonzero(1 - structure.cosines <= most)
    pairs = np.stack([structure.rows[i], structure.neighbours[i, place]], axis=1)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    return pairs.reshape(-1, 2)


def small_pictures(images: np.ndarray) -> np.ndarray:
    """Images uint8 `[n, h, w, 3]` as float32 `[n, 8, 8, 3]` in [0, 255], averaged over areas."""
    from PIL import Image

    shrink = [
        Image.fromarray(x).resize((_SIDE, _SIDE), Image.Resampling.BOX)  # averages
        for x in images
    ]
    return np.stack([np.asarray(x, np.float32) for x in shrink])


def difference(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How different small pictures `[p, h, w, 3]` are from others, and which are mirrored.

    Returns:
        float `[p]`: root mean square of the difference over the standard deviation of `a`'s
        values (at least 10 grey levels), of `b` or its mirror image, whichever is less; and bool
        `[p]`, whether it is the mirror image's.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    contrast = np.maximum(a.std(axis=(1, 2, 3)), _CONTRAST)
    plain, mirrored = (
        np.sqrt(((a - other) ** 2).mean(axis=(1, 2, 3))) / contrast for other in (b, b[:, :, ::-1])
    )
    return np.minimum(plain, mirrored), mirrored < plain


def _group(features: np.ndarray, rows: np.ndarray, pictures: np.ndarray) -> Group:
    unit = features[rows].astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    apart, mirrored = difference(np.broadcast_to(pictures[:1], pictures.shape), pictures)
    return Group(rows, np.clip(unit @ unit[0], -1, 1), apart, mirrored)
